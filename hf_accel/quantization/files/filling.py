"""Fills an empty model from a checkpoint: packed modules first, then every other tensor, none of them twice in memory.

Each tensor of the model must be in the files, and each in the files must be asked for. Cost: one unpacked weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_accel.core.model.experts import ExpertsForm, described_experts
from hf_accel.errors import CheckpointError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.inventory import OWN_TENSORS
from hf_accel.quantization.files.layout import Description, Layout, Source
from hf_accel.quantization.files.mxfp4 import PARTS, read_experts
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear, linear_weight
from hf_accel.quantization.modules.permuted import PermutedLinear

_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # products of an expert, as files name them
_OUTDATED = (r"rotary_emb\.inv_freq$",)  # computed from the config since transformers 4.32


class Filler:
    """Fills one empty model from a checkpoint.

    used: the tensors that it has taken; filled: those of the model that came with a packed one.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
        self.model, self.checkpoint, self.dtype = model, checkpoint, dtype
        self.used: set[str] = set()
        self.filled: set[str] = set()

    def replace(self, name: str, module: Any, layout: Layout) -> None:
        """Put a packed product or table in the place of the module called `name`."""
        if isinstance(module, nn.Embedding):
            if type(module) is not nn.Embedding or layout.scheme != Scheme(8):
                raise CheckpointError(
                    f"{self.checkpoint.listing}, module {name}: a table of embeddings ({type(module).__name__}) in "
                    f"{layout.scheme} is not served; 8 bits per row of a plain nn.Embedding are. "
                    "Load the folder with AutoModelForCausalLM."
                )
            rows, columns = module.weight.shape
            self._set(name, QuantizedEmbedding(self._packed(name, rows, columns, layout)[0], module))
            return
        rows, columns = linear_weight(module).shape
        packed, order = self._packed(name, rows, columns, layout)
        if module.bias is None:
            self._skip_bias(name, rows)
        product: nn.Module = QuantizedLinear(packed, module.bias if order is None else None, self.model.dtype)
        if order is not None:
            product = PermutedLinear(product, order, module.bias)  # type: ignore[arg-type]
        self._set(name, product)

    def _skip_bias(self, name: str, rows: int) -> None:
        """Leave out the bias of zeros that old packers of GPTQ gave to products without one."""
        if f"{name}.bias" in self.checkpoint:
            if bool(self.checkpoint.tensor(f"{name}.bias", (rows,)).any()):
                raise self.checkpoint.damaged(f"{name}.bias", "the model that config.json describes has no such bias")
            self.used.add(f"{name}.bias")

    def replace_experts(self, name: str, layouts: Mapping[tuple[str, int], Layout]) -> None:
        """Put packed experts in the place of the module called `name`."""
        modules = dict(self.model.named_modules())
        module: Any = modules.get(name)
        if module is None:
            raise CheckpointError(
                f"{self.checkpoint.listing} has packed experts {name}, which the model of config.json does not have."
            )
        form = self._form(name, module)
        lists: list[list[QuantizedLinear]] = []
        shapes = ((2 * form.inner, form.hidden), (form.hidden, form.inner))
        for part, (rows, columns) in zip(PARTS, shapes, strict=True):
            absent = [f"{name}.{part}.{index}" for index in range(form.experts) if (part, index) not in layouts]
            if absent:
                raise CheckpointError(f"{self.checkpoint.listing} lacks the packed expert {absent[0]}.")
            packed = [
                self._packed(f"{name}.{part}.{index}", rows, columns, layouts[part, index])[0]
                for index in range(form.experts)
            ]
            bias = torch.zeros(rows, dtype=self.model.dtype) if form.biased else None
            lists.append([QuantizedLinear(weight, bias, self.model.dtype) for weight in packed])
        gate_up, down = lists
        self._set(name, QuantizedExperts(gate_up, down, module))

    def replace_mxfp4_experts(self, name: str, module: Any) -> None:
        """Put packed experts in the place of the module called `name`, from files that hold them in MXFP4."""
        source, form = Source(self.checkpoint, name), self._form(name, module)
        lists = read_experts(source, form, self.model.dtype, self.dtype)
        self.used |= source.used
        if form.biased:
            self.filled |= {f"{name}.{part}.{index}.bias" for part in PARTS for index in range(form.experts)}
        self._set(name, QuantizedExperts(*lists, module))

    def _form(self, name: str, module: Any) -> ExpertsForm:
        try:
            return described_experts(module)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.checkpoint.listing} has packed experts {name}, and those of a {type(module).__name__} cannot "
                f"be served: {error}. Load the folder with AutoModelForCausalLM."
            ) from error

    def replace_split_experts(self, name: str, module: Any, description: Description) -> bool:
        """Put packed experts in the place of stacked ones, from files that hold each expert's products by themselves.

        Returns whether the files hold any.
        """
        checkpoint = self.checkpoint
        for gate, up, down in _SPLIT:
            if description.layout(f"{name}.0.{gate}", None, checkpoint) is None:
                continue
            inner, hidden = module.down_proj.shape[2], module.down_proj.shape[1]
            lists: tuple[list[QuantizedLinear], list[QuantizedLinear]] = ([], [])
            for index in range(len(module.down_proj)):
                halves = [self._expert(f"{name}.{index}.{part}", inner, hidden, description) for part in (gate, up)]
                weights = (
                    _joined(halves, checkpoint, f"{name}.{index}.{up}"),
                    self._expert(f"{name}.{index}.{down}", hidden, inner, description),
                )
                for products, weight in zip(lists, weights, strict=True):
                    products.append(QuantizedLinear(PackedWeight.pack(weight), None, self.model.dtype))
            self._set(name, QuantizedExperts(*lists, module))
            return True
        return False

    def _expert(self, name: str, rows: int, columns: int, description: Description) -> Affine:
        layout = description.layout(name, None, self.checkpoint)
        if layout is None:
            raise self.checkpoint.damaged(f"{name}.qweight", "it is missing, though others of its layer are there")
        source = Source(self.checkpoint, name)
        weight, order = layout.read(source, rows, columns)
        if order is not None:
            raise source.damaged("g_idx", "experts with columns in the order of activations are not served")
        self.used |= source.used
        return weight.unpack() if isinstance(weight, PackedWeight) else weight

    def share(self, name: str, source: str) -> None:
        """Put a table of embeddings that has the codes of the product `source` in the place of `name`."""
        modules = dict(self.model.named_modules())
        table, product = modules.get(name), modules.get(source)
        if type(table) is not nn.Embedding or not isinstance(product, QuantizedLinear):
            raise CheckpointError(
                f"{self.checkpoint.listing}: config.json says that {name} has the codes of {source}, but the first is "
                "not a table of embeddings or the second is not a packed product."
            )
        self._set(name, QuantizedEmbedding(product.packed, table))

    def fill(self) -> None:
        """Fill everything that is not packed, tie what is tied, and check that nothing is missing or left over."""
        model, checkpoint = self.model, self.checkpoint
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for name in self._unpacked_names():
            if name in tied and name not in checkpoint:
                continue
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            before = getattr(module, leaf)
            if before.is_floating_point():
                value = checkpoint.tensor(name, before.shape)
                value = value.to(self.dtype or value.dtype, copy=True)
            else:
                value = checkpoint.tensor(name, before.shape, (before.dtype,)).clone()
            self.used.add(name)
            if leaf in module._parameters:
                trains = before.requires_grad
                module._parameters[leaf] = nn.Parameter(value, requires_grad=trains)
            else:
                module._buffers[leaf] = value
        ignorable = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OUTDATED]
        for name in checkpoint.files.keys() - self.used:
            if name not in tied and not any(re.search(pattern, name) for pattern in ignorable):
                raise checkpoint.damaged(name, "the model that config.json describes has no such tensor")
        _compute_buffers(model)
        model.tie_weights()

    def _unpacked_names(self) -> list[str]:
        packed = {
            f"{name}.{tensor}"
            for name, module in self.model.named_modules()
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding, PermutedLinear))
            for tensor in OWN_TENSORS
        }
        return [name for name in self.model.state_dict() if name not in packed | self.filled]

    def _packed(self, name: str, rows: int, columns: int, layout: Layout) -> tuple[PackedWeight, Tensor | None]:
        source = Source(self.checkpoint, name)
        weight, order = layout.read(source, rows, columns)
        self.used |= source.used
        return weight if isinstance(weight, PackedWeight) else PackedWeight.pack(weight), order

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        self.model.get_submodule(parent)._modules[leaf] = module


def _joined(parts: list[Affine], checkpoint: Checkpoint, name: str) -> Affine:
    """Return the weight with the rows of all parts one after the other."""
    schemes = {(part.scheme.bits, part.scheme.group_size) for part in parts}
    if len(schemes) > 1:
        raise checkpoint.damaged(f"{name}.qweight", "it has other bits or groups than the product it runs with")
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat(
            [torch.zeros_like(part.scales, dtype=torch.int8) if part.zeros is None else part.zeros for part in parts]
        )
    return Affine(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        zeros,
        replace(parts[0].scheme, symmetric=zeros is None),
    )


def _compute_buffers(model: Any) -> None:
    """Let modules compute the buffers that no checkpoint holds, where the architecture does so by initialising."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    owners: dict[str, Any] = {}  # each module is initialised by the nearest model that holds it
    for name, module in model.named_modules():
        owner = module if isinstance(module, PreTrainedModel) else owners[name.rpartition(".")[0]]
        owners[name] = owner
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            continue  # complete, and no weights to initialise
        own = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for buffer in own:
            module._buffers[buffer]._is_hf_initialized = False  # type: ignore[union-attr]
        if own:
            owner._init_weights(module)
