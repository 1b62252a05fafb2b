"""Filling modules of experts: from files of ours, from files of MXFP4, and from files with each expert by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.experts import ExpertsLayout, layout_of
from hf_accel.errors import CheckpointError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.files.layout import Description, Layout, Source
from hf_accel.quantization.files.mxfp4 import read_experts
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts, known_layout, shape_of
from hf_accel.quantization.modules.linear import QuantizedLinear

_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # products of an expert, as files name them


def replace_experts(filler: Filler, name: str, layouts: Mapping[tuple[str, int], Layout]) -> None:
    """Put packed experts in the place of the module called `name`; `layouts`: of each product of each expert.

    Raises:
        CheckpointError: the model has no such experts, or not all of theirs are stored.
    """
    module, listing = dict(filler.model.named_modules()).get(name), filler.checkpoint.listing
    layout = known_layout(module) if module is not None else None
    if layout is None:
        raise CheckpointError(f"{listing} has packed experts {name}, which the model of config.json does not have.")
    lists: tuple[list[QuantizedLinear], list[QuantizedLinear]] = ([], [])
    for part, products in zip(PRODUCTS, lists, strict=True):
        rows, columns = shape_of(layout, part)
        names = [f"{name}.{part}.{index}" for index in range(layout.experts)]
        if absent := [names[index] for index in range(layout.experts) if (part, index) not in layouts]:
            raise CheckpointError(f"{listing} lacks the packed expert {absent[0]}.")
        for index, own in enumerate(names):
            bias = torch.empty(rows, dtype=filler.model.dtype) if layout.biased else None  # filled as any other tensor
            packed = filler.packed(own, rows, columns, layouts[part, index])[0]
            products.append(QuantizedLinear(packed, bias, filler.model.dtype))
    filler.put(name, QuantizedExperts(*lists, module))


def replace_split_experts(
    filler: Filler, name: str, module: Any, layout: ExpertsLayout, description: Description
) -> bool:
    """Put packed experts in the place of stacked ones, from files that hold each expert's products by themselves.

    Returns whether the files hold any.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    checkpoint = filler.checkpoint
    for names in _SPLIT:
        if description.layout(f"{name}.0.{names[0]}", None, checkpoint) is None:
            continue
        lists: tuple[list[QuantizedLinear], list[QuantizedLinear]] = ([], [])
        for index in range(layout.experts):
            gate, up, down = (f"{name}.{index}.{part}" for part in names)
            for product, products, parts in zip(PRODUCTS, lists, ((gate, up), (down,)), strict=True):
                rows, columns = shape_of(layout, product)
                weights = [_weight(filler, part, rows // len(parts), columns, description) for part in parts]
                weight = _joined(weights, checkpoint, parts[-1])
                bias = _bias(filler, parts, rows // len(parts)) if layout.biased else None
                products.append(QuantizedLinear(PackedWeight.pack(weight), bias, filler.model.dtype))
        experts = QuantizedExperts(*lists, module)
        filler.put(name, experts)
        filler.filled |= {f"{name}.{own}" for own, _ in experts.named_parameters()}
        return True
    return False


def replace_mxfp4_experts(filler: Filler, name: str, module: Any) -> None:
    """Put packed experts in the place of the module called `name`, from files that hold them in MXFP4.

    Raises:
        CheckpointError: the module's layout is not known, or a tensor is missing or damaged.
    """
    try:
        layout = layout_of(module)
    except ValueError as error:
        raise CheckpointError(
            f"{filler.checkpoint.listing} has packed experts {name}, and those of a {type(module).__name__} cannot be "
            f"served: {error}. Load the folder with AutoModelForCausalLM."
        ) from error
    source = Source(filler.checkpoint, name)
    experts = QuantizedExperts(*read_experts(source, layout, filler.model.dtype, filler.dtype), module)
    filler.put(name, experts)
    filler.used |= source.used
    filler.filled |= {f"{name}.{own}" for own, _ in experts.named_parameters()}


def _weight(filler: Filler, name: str, rows: int, columns: int, description: Description) -> Affine:
    layout = description.layout(name, None, filler.checkpoint)
    if layout is None:
        raise filler.checkpoint.damaged(f"{name}.qweight", "it is missing, though others of its layer are there")
    source = Source(filler.checkpoint, name)
    weight, order = layout.read(source, rows, columns)
    if order is not None:
        raise source.damaged("g_idx", "experts with columns in the order of activations are not served")
    filler.used |= source.used
    return weight.unpack() if isinstance(weight, PackedWeight) else weight


def _bias(filler: Filler, parts: Sequence[str], rows: int) -> Tensor:
    """Return the biases of all parts one after the other."""
    names = [f"{part}.bias" for part in parts]
    filler.used |= set(names)
    return torch.cat([filler.checkpoint.tensor(name, (rows,)) for name in names]).to(filler.model.dtype)


def _joined(parts: Sequence[Affine], checkpoint: Checkpoint, name: str) -> Affine:
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
