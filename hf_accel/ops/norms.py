"""Residual and RMS norm of decoder layers, as eager code rounds them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: str) -> Tensor:
    """Return the RMS norm of x [..., E] (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    style "llama" rounds the normalised value and multiplies it by the weight; "gemma" multiplies by 1 + weight in fp32
    and rounds once.
    """
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype) if style == "gemma" else weight * normed.to(x.dtype)


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

    hidden, added [..., E] of one dtype; added None: nothing is added. weight [E]; None: no norm. inner_weight [E]:
    `added` is normed before.
    """
    if added is not None:
        if inner_weight is not None:
            added = rms_norm(added, inner_weight, eps, style)
        hidden = hidden + (added if residual_scale == 1.0 else added * residual_scale)
    return hidden, hidden if weight is None else rms_norm(hidden, weight, eps, style)
