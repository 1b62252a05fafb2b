"""Residual and norm in one launch, on a GPU: one program per row, which is read once. Twin: `hf_accel.ops.norms`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel.kernels.triton import on_its_device
from hf_accel.kernels.triton.activation import rounded


@triton.jit
def _normed(x, weight, at, eps, SIZE: tl.constexpr, IS_GEMMA: tl.constexpr, y):
    """Return the RMS norm of a row x, fp32, zero beyond SIZE; multiplied by the weight as the style says."""
    x = x / tl.sqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    factor = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
    return x * (1.0 + factor) if IS_GEMMA else rounded(x, y) * factor


@triton.jit
def _add_norm(
    hidden, added, inner_weight, weight, total, y, stride, eps, residual_scale,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_GEMMA: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_INNER: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < SIZE
    x = tl.load(hidden + row.to(tl.int64) * stride + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDED:
        more = tl.load(added + row.to(tl.int64) * SIZE + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_INNER:
            more = rounded(_normed(more, inner_weight, at, eps, SIZE, IS_GEMMA, y), y)
        x = rounded(x + rounded(more * residual_scale, y), y)
        tl.store(total + row.to(tl.int64) * SIZE + at, x.to(y.dtype.element_ty), mask=mask)
    if HAS_NORM:
        x = _normed(x, weight, at, eps, SIZE, IS_GEMMA, y)
        tl.store(y + row.to(tl.int64) * SIZE + at, x.to(y.dtype.element_ty), mask=mask)


@on_its_device
def add_norm(
    hidden: Tensor,
    added: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float,
    style: str,
    inner_weight: Tensor | None = None,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return hidden + scale · added, and the RMS norm of it; of the two, what is not asked for is the other.

    hidden [..., E], rows at one distance from each other; added [..., E] contiguous or None; weight [E], None: no norm;
    style "llama" or "gemma", see `hf_accel.kernels.native.BlockShape`. inner_weight: `added` is normed first.
    """
    size = hidden.shape[-1]
    rows = hidden.numel() // size
    y = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    total = hidden if added is None else y if weight is None else torch.empty_like(y)
    _add_norm[(rows,)](
        hidden, hidden if added is None else added, hidden if inner_weight is None else inner_weight,
        hidden if weight is None else weight, total, y, hidden.stride(-2), eps, residual_scale,
        SIZE=size, BLOCK=triton.next_power_of_2(size), IS_GEMMA=style == "gemma", HAS_ADDED=added is not None,
        HAS_INNER=inner_weight is not None, HAS_NORM=weight is not None,
        num_warps=4 if size <= 2048 else 8 if size <= 8192 else 16,
    )  # fmt: skip
    return total, y
