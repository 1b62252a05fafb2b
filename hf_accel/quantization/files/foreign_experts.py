"""Filling modules of experts from files of other programs, which name and lay out their products in their own ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_accel.core.model.experts import ExpertsLayout
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.files.layout import Description, Layout, Source
from hf_accel.quantization.files.rules import Rules
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts, ordered, shape_of
from hf_accel.quantization.modules.linear import QuantizedLinear

# an expert's product, where a description asks for its class
_STAND_IN = nn.Linear(1, 1, bias=False, device="meta")


class _Spelling(NamedTuple):
    """How files name the products of expert `{}`, gate and up apart or together; is_stacked: all experts in one."""

    gate_up: tuple[str, ...]
    down: str
    is_stacked: bool = False


_SPELLINGS = (
    _Spelling(("{}.gate_proj", "{}.up_proj"), "{}.down_proj"),
    _Spelling(("{}.w1", "{}.w3"), "{}.w2"),
    # GPTQModel, of gpt-oss: rows of gate and up as the model has them
    _Spelling(("gate_up.{}",), "down.{}"),
    _Spelling(("gate_up_projs.{}",), "down_projs.{}"),
    _Spelling(("gate_up_proj",), "down_proj", is_stacked=True),
)


def replace_foreign_experts(
    filler: Filler, name: str, module: Any, layout: ExpertsLayout, description: Description
) -> bool:
    """Put packed experts in the place of stacked ones, from files of other programs, in whatever way they name them.

    Returns whether the files hold any.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    for spelling in _SPELLINGS:
        if _layout(filler, f"{name}.{spelling.gate_up[0].format(0)}", description) is None:
            continue
        lists: tuple[list[QuantizedLinear], list[QuantizedLinear]] = ([], [])
        for index in range(layout.experts):
            for product, products, parts in zip(PRODUCTS, lists, (spelling.gate_up, (spelling.down,)), strict=True):
                names, place = [part.format(index) for part in parts], index if spelling.is_stacked else None
                made = _product(filler, name, names, shape_of(layout, product), layout, product, place, description)
                products.append(made)
        experts = QuantizedExperts(*lists, module)
        filler.put(name, experts)
        filler.filled |= {f"{name}.{own}" for own, _ in experts.named_parameters()}
        return True
    return False


def _product(
    filler: Filler,
    name: str,
    parts: Sequence[str],
    shape: tuple[int, int],
    layout: ExpertsLayout,
    product: str,
    place: int | None,
    description: Description,
) -> QuantizedLinear:
    """Return a product of the experts `name` whose rows lie in `parts`; place: of the expert in stacked tensors."""
    rows, columns = shape[0] // len(parts), shape[1]
    sources = [_Stacked(filler.checkpoint, f"{name}.{part}", place, layout.experts) for part in parts]
    weight = _joined([_weight(filler, s, rows, columns, description) for s in sources], sources[-1])
    bias = torch.cat([source.bias(rows) for source in sources]) if layout.biased else None
    for source in sources:
        filler.used |= source.used
    if len(parts) == 1:
        weight, bias = ordered(weight, bias, layout, product)
    return QuantizedLinear(PackedWeight.pack(weight), bias, filler.model.dtype)


class _Stacked(Source):
    """The tensors of one expert, which lie by themselves, or at `place` in tensors of all experts."""

    def __init__(self, checkpoint: Checkpoint, name: str, place: int | None, experts: int) -> None:
        super().__init__(checkpoint, name)
        self.place, self.experts = place, experts

    def shape(self, suffix: str) -> tuple[int, ...] | None:
        found = super().shape(suffix)
        return found if self.place is None or found is None else found[1:]

    def tensor(self, suffix: str, shape: Iterable[int], *dtypes: tuple[torch.dtype, ...]) -> Tensor:
        if self.place is None:
            return super().tensor(suffix, shape, *dtypes)
        return super().tensor(suffix, (self.experts, *shape), *dtypes)[self.place]

    def bias(self, rows: int) -> Tensor:
        """Return the bias [rows]."""
        if self.place is None:
            return self.tensor("bias", (rows,))
        self.used.add(f"{self.name}_bias")
        return self.checkpoint.tensor(f"{self.name}_bias", (self.experts, rows))[self.place]


def _layout(filler: Filler, name: str, description: Description) -> Layout | None:
    if isinstance(description, Rules) and f"{name}.weight_packed" not in filler.checkpoint:
        return None  # it speaks of classes of modules, whether there are such modules or not
    return description.layout(name, _STAND_IN, filler.checkpoint)


def _weight(filler: Filler, source: Source, rows: int, columns: int, description: Description) -> Affine:
    layout = _layout(filler, source.name, description)
    if layout is None:
        raise source.damaged("qweight", "it is missing, though others of its layer are there")
    weight, order = layout.read(source, rows, columns)
    if order is not None:
        raise source.damaged("g_idx", "experts with columns in the order of activations are not served")
    return weight.unpack() if isinstance(weight, PackedWeight) else weight


def _joined(parts: Sequence[Affine], source: Source) -> Affine:
    """Return the weight with the rows of all parts one after the other."""
    if len(parts) == 1:
        return parts[0]
    schemes = {(part.scheme.bits, part.scheme.group_size) for part in parts}
    if len(schemes) > 1:
        raise source.damaged("qweight", "it has other bits or groups than the product it runs with")
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
