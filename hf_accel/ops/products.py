"""Products that share an input, or are joined by an activation, and what follows them, as eager code rounds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def activated(x: Tensor, activation: str) -> Tensor:
    """Return one of the activations silu, gelu_tanh, gelu (erf) and relu."""
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    found: Tensor = getattr(functional, activation)(x)
    return found


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """Return x W_iᵀ + b_i side by side, [..., sum of N_i]; scaled and added to `residual` of that shape where given.

    x [..., K], weights [N_i, K], biases [N_i] or None.
    """
    added = biases or [None] * len(weights)
    y = torch.cat([functional.linear(x, w, b) for w, b in zip(weights, added, strict=True)], dim=-1)
    if residual is None:
        return y
    return residual + (y if residual_scale == 1.0 else y * residual_scale)


def gated(
    x: Tensor, gate: Tensor, up: Tensor, activation: str, biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Return activation(x gateᵀ + b) · (x upᵀ + c), [..., N]; gate and up [N, K] (Shazeer 2020, arXiv:2002.05202)."""
    first, second = biases or (None, None)
    return activated(functional.linear(x, gate, first), activation) * functional.linear(x, up, second)
