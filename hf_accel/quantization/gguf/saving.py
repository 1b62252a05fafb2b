"""Writing a model to a GGUF file: packed weights bit by bit, everything else in the dtype it has.

What is written is checked before a byte is: the config that a reader makes of the metadata must be the model's, and the
tokenizer's ids those of what the file says. The file is written beside its place and moved there when it is complete.
Cost: one tensor at a time in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.failures import converting
from hf_accel.errors import CheckpointError, UnsupportedModelError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.quantization.gguf.agreement import differences
from hf_accel.quantization.gguf.architectures import (
    Architecture,
    is_norm,
    metadata_of,
    names,
    row_order,
    written_as,
)
from hf_accel.quantization.gguf.package import gguf_package
from hf_accel.quantization.gguf.ropes import FACTORS, factors
from hf_accel.quantization.gguf.types import DENSE, encoded, type_for
from hf_accel.quantization.gguf.vocabulary import describe
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.linear import QuantizedLinear

_TYPES = {dtype: name for name, dtype in DENSE.items()}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "MXFP4": 38}


@dataclass
class GgufReport:
    """What became of a model's tensors: types: type -> their number; rounded: name -> largest error, relative to the
    largest value of the tensor, of packed weights that no type holds, written as F16; notes: sentences on what else
    differs."""

    path: Path
    nbytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "path": str(self.path),
            "nbytes": self.nbytes,
            "types": self.types,
            "rounded": self.rounded,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        lines = [f"{self.path}: {self.nbytes / 1e6:.1f} MB, {counts} tensors"]
        if self.rounded:
            lines.append(
                f"{len(self.rounded)} packed weights are F16, within {max(self.rounded.values()):.1g} of their "
                f"largest value, "
                "for no type of GGUF holds their scales (load the model in bfloat16 or float16 before quantizing it), "
                f"offsets or columns: {', '.join(list(self.rounded)[:3])}"
            )
        return "\n".join([*lines, *self.notes])


def export_gguf(
    model: Any, path: str | os.PathLike[str], tokenizer: Any = None, advance: Callable[[], None] = lambda: None
) -> GgufReport:
    """Write a model to a GGUF file that llama.cpp opens, its packed weights bit by bit, and return a report.

    Symmetric weights of 2 to 4 bits become Q4_0, of 8 bits Q8_0, MXFP4 stays so, those of a file in Q4_1 become that
    again; a scale of more than 32 columns is repeated. A weight whose scales fp16 does not hold, or whose columns 32
    does not divide, is written as F16. Everything else keeps its dtype; norms and biases are F32.

    Args:
        model: of an architecture that `gguf.architectures` has a row for.
        path: the file; one that is there is replaced.
        tokenizer: its tokenizer; None: the file holds none.
        advance: called after each tensor.

    Raises:
        UnsupportedModelError: the model or its tokenizer cannot be said in such a file; nothing was written.
        CheckpointError: the file cannot be written.
        MissingDependencyError: the gguf package is not installed.
    """
    package = gguf_package()
    row = written_as(model.config.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"A {type(model).__name__} cannot be written to a GGUF file: no row of the table says what llama.cpp "
            f"calls its "
            "parts. Save it by hf_accel.save_pretrained, and convert that."
        )
    export = _Export(model, row, Path(path))
    vocabulary = {"tokenizer.ggml.model": "no_vocab"} if tokenizer is None else describe(tokenizer, export.rows)
    target = Path(path)
    beside = target.with_name(f"{target.name}.part")
    try:
        with converting(CheckpointError, f"{target} cannot be written", "Name another place, or free memory."):
            export.write(package, beside, vocabulary, advance)
            export.report.nbytes = beside.stat().st_size
            os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return export.report


class _Export:
    """What there is to write of one model; building it checks that it can be written."""

    def __init__(self, model: Any, row: Architecture, path: Path) -> None:
        self.model, self.row, self.report = model, row, GgufReport(path)
        config = model.config
        self.metadata = metadata_of(config, row)
        self.packed = _packed(model)
        own = tuple(f"{name}." for name in self.packed)
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(own) or name.endswith(".bias")
        }
        self.tensors: dict[str, Tensor | PackedWeight] = {**state, **{f"{n}.weight": w for n, w in self.packed.items()}}
        self._leave_tied()
        self.stored = names(row, config.num_hidden_layers, self.tensors)
        self.rows = self.tensors[self._table()].shape[0]
        if reason := differences(config, row, self.metadata, self.stored.values(), self.rows):
            raise UnsupportedModelError(
                f"This {type(model).__name__} cannot be written to a GGUF file: files of the architecture {row.name} "
                f"do not "
                f"say {reason}. Nothing was written."
            )
        if self.metadata["context_length"] < config.max_position_embeddings:
            self.report.notes.append(
                f"llama.cpp has no window of {config.sliding_window} tokens for {row.name}; the file's context is as "
                f"long"
            )

    def write(self, package: Any, path: Path, vocabulary: dict[str, Any], advance: Callable[[], None]) -> None:
        writer = package.GGUFWriter(str(path), self.row.name)
        try:
            writer.add_type("model")
            writer.add_name(Path(self.model.config.name_or_path or self.report.path.stem).name or self.row.name)
            for key, value in {**{f"{self.row.name}.{k}": v for k, v in self.metadata.items()}, **vocabulary}.items():
                _add(package, writer, key, value)
            writer.add_vocab_size(self.rows)
            kinds = {name: self._kind(name) for name in self.tensors}
            common = max(kinds.values(), key=list(kinds.values()).count) if kinds else "F32"
            writer.add_file_type(_FILE_TYPES[common])
            writer.add_quantization_version(package.GGML_QUANT_VERSION)
            extra = factors(self.model.config)
            if extra is not None:
                self._announce(package, writer, FACTORS, extra.shape, "F32")
            for name, kind in kinds.items():
                self._announce(package, writer, self.stored[name], self.tensors[name].shape, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if extra is not None:
                writer.write_tensor_data(extra.numpy())
            for name, kind in kinds.items():
                writer.write_tensor_data(self._bytes(name, kind).numpy())
                self.report.types[kind] = self.report.types.get(kind, 0) + 1
                advance()
        finally:
            writer.close()

    def _announce(self, package: Any, writer: Any, name: str, shape: Any, kind: str) -> None:
        columns, nbytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
        count = int(torch.Size(shape).numel()) // columns * nbytes
        writer.add_tensor_info(name, list(shape), torch.float32, count, raw_dtype=package.GGMLQuantizationType[kind])

    def _kind(self, name: str) -> str:
        """Return the type as which a tensor is written."""
        value = self.tensors[name]
        if isinstance(value, PackedWeight):
            return type_for(value) or "F16"
        return _TYPES[value.dtype] if value.dim() > 1 else "F32"

    def _bytes(self, name: str, kind: str) -> Tensor:
        """Return the bytes of a tensor as they are written, uint8."""
        value, order = self.tensors[name], row_order(self.row, self.stored[name], self.model.config)
        if isinstance(value, PackedWeight) and kind != "F16":
            made = encoded(value, kind)
        elif isinstance(value, PackedWeight):
            exact = value.dequantize()
            made = exact.half()
            self.report.rounded[name] = float((made.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        else:
            made = value.detach().cpu().to(DENSE[kind])
            if self.row.norm_offset and is_norm(self.stored[name]):
                made = made + self.row.norm_offset
        made = made.cpu()
        if order is not None:
            made = made[torch.argsort(order)]
        return made.contiguous().view(torch.uint8)

    def _table(self) -> str:
        return next(name for name, stored in self.stored.items() if stored == "token_embd.weight")

    def _leave_tied(self) -> None:
        """Leave the head out where it is the table of embeddings."""
        model = self.model
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        paths = {id(module): name for name, module in model.named_modules()}
        one, two = (self.tensors[f"{paths[id(module)]}.weight"] for module in (head, table))
        if isinstance(one, PackedWeight) != isinstance(two, PackedWeight):
            is_tied = False
        elif isinstance(one, PackedWeight):
            is_tied = one.codes.data_ptr() == two.codes.data_ptr()  # type: ignore[union-attr]
        else:
            is_tied = one.data_ptr() == two.data_ptr()  # type: ignore[union-attr]
        if is_tied:
            del self.tensors[f"{paths[id(head)]}.weight"]
        elif self.row.is_tied:
            raise UnsupportedModelError(
                f"llama.cpp has one table for embeddings and head of {self.row.name}; this {type(model).__name__} "
                f"has two. "
                "Quantize it with head=8 and embeddings=8, which share one, or with head=None."
            )


def _packed(model: Any) -> dict[str, PackedWeight]:
    """Return name -> weight of the packed products and tables.

    Raises:
        UnsupportedModelError: there are packed parts of other kinds, or parts of an adapter.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            found[name] = module.packed
        elif type(module).__module__.startswith("hf_accel.quantization.modules"):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, whose weights no type of GGUF holds. Restore the model, or "
                f"quantize it "
                "without it."
            )
    return found


def _add(package: Any, writer: Any, key: str, value: Any) -> None:
    """Add a value of the type that llama.cpp expects of its kind."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
