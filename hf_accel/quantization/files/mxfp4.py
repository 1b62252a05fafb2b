"""MXFP4 in files: the experts of gpt-oss checkpoints, and single products as compressed-tensors stores them.

gpt-oss holds the products of all experts of a layer as `gate_up_proj_blocks` uint8 [experts, 2 I, E / 32, 16] (two fp4
values per byte, the first in the low half; rows of gate and up by turns), `gate_up_proj_scales` uint8 [experts, 2 I,
E / 32] (exponents, 2^(e - 127)) and `gate_up_proj_bias` [experts, 2 I], and `down_proj_...` alike. compressed-tensors
(`mxfp4-pack-quantized`) holds a weight [N, K] as `weight_packed` uint8 [N, K / 2] and `weight_scale` uint8 [N, K / 32].
Bits are taken as they are and never expanded. Cost: a copy of one expert's weight at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.experts import ExpertsLayout
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import fp4
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.layout import Layout, Source, Stored
from hf_accel.quantization.modules.experts import PRODUCTS, gate_first, shape_of
from hf_accel.quantization.modules.linear import QuantizedLinear

MXFP4 = "mxfp4"
FORMAT = "mxfp4-pack-quantized"
SUFFIXES = tuple(f"{part}_{kind}" for part in PRODUCTS for kind in ("blocks", "scales", "bias"))
SCHEME = Scheme(4, fp4.GROUP, code_book=fp4.NAME)
_BYTES = (torch.uint8,)
_NAN = "it holds NaN (the exponent 255)"


class Mxfp4Description:
    """The description that gpt-oss checkpoints have (`quant_method="mxfp4"`): experts are packed, and nothing else is.

    Which experts are is seen from the tensors.
    """

    is_public = True

    def __init__(self, description: Mapping[str, Any], where: str) -> None:
        pass

    def layout(self, name: str, module: Any, checkpoint: Checkpoint) -> Layout | None:
        """Return None: no product but those of experts is packed."""
        return None

    def holds(self, name: str, checkpoint: Checkpoint) -> bool:
        """Return whether the experts called `name` are packed."""
        return any(f"{name}.{part}_{kind}" in checkpoint for part in PRODUCTS for kind in ("blocks", "scales"))


class PackMxfp4:
    """A product in `mxfp4-pack-quantized`."""

    @property
    def scheme(self) -> Scheme:
        return SCHEME

    def read(self, source: Source, rows: int, columns: int) -> Stored:
        """Return the weight [rows, columns].

        Raises:
            CheckpointError: a tensor is missing or damaged, or 32 does not divide the columns.
        """
        if columns % fp4.GROUP:
            raise source.damaged("weight_packed", f"groups of {fp4.GROUP} do not divide its {columns} columns")
        blocks, scales = (source.tensor(*item, _BYTES) for item in stored_shapes(rows, columns).items())
        if bool((scales > fp4.LARGEST_EXPONENT).any()):
            raise source.damaged("weight_scale", _NAN)
        return Stored(PackedWeight.from_mxfp4(blocks, scales), None)


def stored_shapes(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that `PackMxfp4` reads."""
    return {"weight_packed": (rows, columns // 2), "weight_scale": (rows, columns // fp4.GROUP)}


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors that `PackMxfp4` reads."""
    blocks, exponents = weight.to_mxfp4()
    return {"weight_packed": blocks, "weight_scale": exponents}


def read_experts(
    source: Source, layout: ExpertsLayout, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[list[QuantizedLinear], list[QuantizedLinear]]:
    """Return the products gate_up, with all rows of gate above those of up, and down of every expert of a layer.

    dtype: of the model; bias_dtype: of the biases, None: as stored.

    Raises:
        CheckpointError: a tensor is missing or damaged, or 32 does not divide the columns of a product.
    """
    lists: tuple[list[QuantizedLinear], list[QuantizedLinear]] = ([], [])
    for part, products in zip(PRODUCTS, lists, strict=True):
        rows, columns = shape_of(layout, part)
        groups = columns // fp4.GROUP
        if columns % fp4.GROUP:
            raise source.damaged(f"{part}_blocks", f"groups of {fp4.GROUP} do not divide its {columns} columns")
        blocks = source.tensor(f"{part}_blocks", (layout.experts, rows, groups, fp4.GROUP // 2), _BYTES)
        scales = source.tensor(f"{part}_scales", (layout.experts, rows, groups), _BYTES)
        if bool((scales > fp4.LARGEST_EXPONENT).any()):
            raise source.damaged(f"{part}_scales", _NAN)
        bias = source.tensor(f"{part}_bias", (layout.experts, rows)) if layout.biased else None
        for index in range(layout.experts):
            ordered = [gate_first(tensor[index], layout, part) for tensor in (blocks.flatten(2), scales)]
            own = (
                None if bias is None else gate_first(bias[index], layout, part).to(bias_dtype or bias.dtype, copy=True)
            )
            products.append(QuantizedLinear(PackedWeight.from_mxfp4(*ordered), own, dtype))
    return lists
