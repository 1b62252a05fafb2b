"""Filling modules of experts: from files of ours, and from files that hold them in MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_accel.core.model.experts import layout_of
from hf_accel.errors import CheckpointError
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.files.layout import Layout, Source
from hf_accel.quantization.files.mxfp4 import read_experts
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts, known_layout, shape_of
from hf_accel.quantization.modules.linear import QuantizedLinear


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
