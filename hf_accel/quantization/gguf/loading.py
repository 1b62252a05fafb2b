"""Loading a model from a GGUF file: blocks become packed products as they lie, everything else is read as it is.

The model is built empty of what the metadata say, and filled as one of ours is: every tensor of the model must be in
the file, and each in the file must be asked for. Cost: the packed model and one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from hf_accel.core.failures import converting
from hf_accel.core.model.anatomy import Anatomy, holds_experts
from hf_accel.errors import CheckpointError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme, quantize
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.files.layout import Source, Stored
from hf_accel.quantization.files.rebuilding import causal_class
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.gguf.architectures import Architecture, config_of, is_norm, names, read_as, row_order
from hf_accel.quantization.gguf.experts import replace_experts, tensor_names
from hf_accel.quantization.gguf.reader import Entry, GgufFile
from hf_accel.quantization.gguf.ropes import FACTORS, LONG, SHORT
from hf_accel.quantization.gguf.types import DENSE, dense, packed
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.linear import QuantizedLinear

_OF_ROPES = (FACTORS, SHORT, LONG)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass
class GgufModel:
    """A loaded model, and what became of the file's tensors.

    types: type -> number of tensors packed as they are; rounded: number of dense ones that were rounded; converted:
    type -> number of tensors that were converted, and the largest error of a value relative to the largest of its row;
    expanded: why stock transformers loaded it, or "".
    """

    model: Any
    types: dict[str, int] = field(default_factory=dict)
    rounded: int = 0
    converted: dict[str, tuple[int, float]] = field(default_factory=dict)
    expanded: str = ""

    @property
    def is_close(self) -> bool:
        """Return whether every weight has the values of the file."""
        return not self.converted and not self.rounded

    def __str__(self) -> str:
        if self.expanded:
            return self.expanded
        parts = [f"{count} tensors of {kind} as they are" for kind, count in sorted(self.types.items())]
        parts += [
            f"{count} tensors of {kind} in 8 bits and groups of 32, each value within {error:.2g} of its row's largest"
            for kind, (count, error) in sorted(self.converted.items())
        ]
        return "; ".join(parts) or "no tensor is packed"


def load_gguf(
    path: str | os.PathLike[str] | GgufFile,
    dtype: torch.dtype | None = None,
    config: WeightOnlyConfig | None = None,
    advance: Callable[[], None] = lambda: None,
) -> GgufModel:
    """Load the model of a GGUF file, in evaluation mode.

    An architecture that is not known here is loaded by stock transformers, which expands it; `expanded` says so.

    Args:
        path: the file, or what was read of it.
        dtype: of everything that is not packed; None: the smallest of bfloat16, float16 and float32 that holds all
            dense tensors exactly.
        config: how dense products are rounded while they are read; None: they stay as they are.
        advance: called after each tensor.

    Raises:
        CheckpointError: the file is damaged, cut short, of another format or of an architecture that nobody here
            knows; or a tensor is missing, of another shape, of a type that is not known, or asked for by no part of
            the model.
        MissingDependencyError: the gguf package is not installed.
    """
    with converting(CheckpointError, f"{getattr(path, 'path', path)} cannot be loaded"):
        file = path if isinstance(path, GgufFile) else GgufFile(path)
        row = read_as(file.architecture)
        if row is None:
            return _by_stock(file, dtype, f"the architecture {file.architecture!r} is not known here")
        return _Loading(file, row, dtype, config, advance).load()


def _by_stock(file: GgufFile, dtype: torch.dtype | None, reason: str) -> GgufModel:
    advice = "Convert the original checkpoint, or load it by its own name."
    with converting(CheckpointError, f"{file.path}: {reason}, and transformers cannot load it either", advice):
        folder, name = file.path.parent, file.path.name
        options = {} if dtype is None else {"dtype": dtype}
        found: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, output_loading_info=True, **options)
        model, report = found
    if missing := sorted(report["missing_keys"]):
        raise file.damaged(f"stock transformers finds no tensor {missing[0]} of a {type(model).__name__} in it")
    return GgufModel(model.eval(), expanded=f"{reason}: stock transformers loaded it, and expanded its weights")


class _Loading:
    """One load: the file with the model's names for its tensors, as `Filler` asks for a checkpoint."""

    def __init__(
        self,
        file: GgufFile,
        row: Architecture,
        dtype: torch.dtype | None,
        config: WeightOnlyConfig | None,
        advance: Callable[[], None],
    ) -> None:
        self.file, self.row, self.rounding, self.advance = file, row, config, advance
        self.config = config_of(file, row)
        self.listing: Path = file.path
        self.dtype = dtype or self._smallest_dtype()
        cls: Any = causal_class(self.config)
        with no_init_weights():
            self.model = cls._from_config(self.config, dtype=self.dtype)
        self.stored = names(row, self.config.num_hidden_layers, self.model.state_dict())
        used = {*self.stored.values(), *(tensor_names(self.config.num_hidden_layers) if row.has_experts else ())}
        for name in file.tensors:
            if name not in used and name not in _OF_ROPES:
                raise file.damaged(
                    f"the tensor {name} belongs to no part of a {cls.__name__} as its metadata describe it"
                )
        self.files = {name: file.path for name, stored in self.stored.items() if stored in file.tensors}
        self.result = GgufModel(self.model)

    def load(self) -> GgufModel:
        model = self.model
        filler = Filler(model, self, self.dtype)  # type: ignore[arg-type]
        head = model.get_output_embeddings()
        is_tied = bool(self.config.tie_word_embeddings)
        for name, module in list(model.named_modules()):
            if self.row.has_experts and holds_experts(module):
                replace_experts(self, filler, name, module)
                self.advance()
            if not isinstance(module, (nn.Embedding, *Anatomy.PRODUCTS)) or (is_tied and module is head):
                continue
            if (layout := self._layout(name, module, head)) is not None:
                filler.replace(name, module, layout)  # type: ignore[arg-type]
                self.advance()
        if is_tied and isinstance(model.get_input_embeddings(), QuantizedEmbedding):
            name = next(name for name, module in model.named_modules() if module is head)
            filler.put(name, QuantizedLinear(model.get_input_embeddings().packed, head.bias, self.dtype))
            self.config.tie_word_embeddings = False
            untie(model)
        filler.fill()
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            model.hf_quantizer = Seal()
        model.config.name_or_path = str(self.file.path)
        ends = [self.file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        if len(found := sorted({end for end in ends if end is not None})) > 1 and model.can_generate():
            model.generation_config.eos_token_id = found
        model.eval()
        return self.result

    def took(self, entry: Entry, error: float) -> None:
        """Count a packed weight."""
        result = self.result
        if error:
            count, largest = result.converted.get(entry.type, (0, 0.0))
            result.converted[entry.type] = count + 1, max(largest, error)
        else:
            result.types[entry.type] = result.types.get(entry.type, 0) + 1

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def entry(self, name: str) -> Entry:
        """Return the tensor of the file that the model calls `name`.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self.files:
            raise self.file.damaged(f"it lacks the tensor {self.stored.get(name, name)}; the file is not complete")
        return self.file.tensors[self.stored[name]]

    def blocks(self, name: str, shape: Iterable[int]) -> tuple[Entry, Tensor]:
        """Return a tensor's entry and bytes, its rows in the model's order.

        Raises:
            CheckpointError: it is missing or of another shape.
        """
        entry = self.entry(name)
        if entry.shape != tuple(shape):
            raise self.damaged(name, f"its shape is {entry.shape}; the metadata ask for {tuple(shape)}")
        found = self.file.blocks(entry)
        order = row_order(self.row, entry.name, self.config)
        return entry, found if order is None else found.view(len(order), -1)[order]

    def tensor(self, name: str, shape: Iterable[int], dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        """Return a dense tensor of this shape in the dtype of the model, as `Checkpoint.tensor` does."""
        entry, blocks = self.blocks(name, shape)
        if entry.type not in DENSE:
            raise self.damaged(
                name, f"it is of type {entry.type}, and this part of the model has none but dense values"
            )
        values = dense(entry, blocks)
        if self.row.norm_offset and is_norm(entry.name):
            values = values.float() - self.row.norm_offset
        found = values.to(self.dtype, copy=True)
        self.file.release(entry)
        self.advance()
        return found

    def damaged(self, name: str, fault: str) -> CheckpointError:
        return self.file.damaged(f"the tensor {self.stored.get(name, name)}: {fault}")

    def _layout(self, name: str, module: Any, head: Any) -> _Layout | None:
        """Return how a product or table is stored, None where it stays dense."""
        if f"{name}.weight" not in self.files:
            return None
        entry = self.entry(f"{name}.weight")
        if entry.type not in DENSE:
            return _Layout(self, None)
        if self.rounding is None or isinstance(module, nn.Embedding):
            return None
        bits = self.rounding.head if module is head else self.rounding.bits_of(name)
        if bits is None:
            return None
        size = None if module is head else self.rounding.group_size_of(name)
        return _Layout(self, self.rounding.scheme(bits, entry.shape[-1], size)[0])

    def _smallest_dtype(self) -> torch.dtype:
        """Return the smallest dtype that holds every dense tensor of the file exactly."""
        entries = [entry for entry in self.file.tensors.values() if entry.type in DENSE and entry.name not in _OF_ROPES]
        for half in _HALVES:
            if all(self._holds(half, entry) for entry in entries):
                return half
        return torch.float32

    def _holds(self, half: torch.dtype, entry: Entry) -> bool:
        if DENSE[entry.type] is not torch.float32:
            return DENSE[entry.type] is half
        values = dense(entry, self.file.blocks(entry))
        if self.row.norm_offset and is_norm(entry.name):
            values = values - self.row.norm_offset
        return torch.equal(values.to(half).float(), values)


@dataclass(frozen=True)
class _Layout:
    """One product or table of a file; scheme: what a dense one is rounded to, None for one of blocks."""

    loading: _Loading
    rounded: Scheme | None

    @property
    def scheme(self) -> Scheme:
        return self.rounded or Scheme(8)

    def read(self, source: Source, rows: int, columns: int) -> Stored:
        loading = self.loading
        entry, blocks = loading.blocks(f"{source.name}.weight", (rows, columns))
        source.used.add(f"{source.name}.weight")
        if self.rounded is not None:
            loading.result.rounded += 1
            return Stored(quantize(dense(entry, blocks), self.rounded, loading.dtype), None)
        found = packed(entry, blocks)
        loading.file.release(entry)
        loading.took(entry, found.error)
        return Stored(found.weight, None)


def untie(model: Any) -> None:
    """Let transformers not tie the head of a model that is new: head and table have one set of codes already."""
    model.config.tie_word_embeddings = False
    for module in model.modules():
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {}


def packed_modules(model: Any) -> dict[str, Any]:
    """Return name -> module of the packed products and tables of a model."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def packed_weights(model: Any) -> dict[str, PackedWeight]:
    """Return name -> weight of the packed products and tables of a model."""
    return {name: module.packed for name, module in packed_modules(model).items()}
