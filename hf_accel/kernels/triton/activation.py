"""Parts that kernels share: products of tiles, activations, and what follows a sum before it is stored."""

from __future__ import annotations

import os

import triton
import triton.language as tl

KINDS = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4}
"""The activation of a gate -> its number in kernels."""


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, whose `dot` takes the bits of bf16 values for numbers."""


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b by tensor cores; total fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """Return the activation of x, fp32."""
    if KIND == 1:
        x = x / (1.0 + tl.exp(-x))
    elif KIND == 2:  # x (1 + tanh u) / 2 = x sigmoid(2 u): no cancellation where tanh u is near -1
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 4:
        x = tl.where(x != x, x, tl.maximum(x, 0.0))
    return x


@triton.jit
def rounded(x, like):
    """Return x rounded to the dtype that `like` points to, as fp32: where eager code would store it."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def finished(total, bias, residual, residual_scale, rows, at, mask, HAS_BIAS: tl.constexpr,
             HAS_RESIDUAL: tl.constexpr, y):  # fmt: skip
    """Return a product from its sum, fp32: bias [rows] added, rounded, then scaled and added to the residual."""
    if HAS_BIAS:
        total += tl.load(bias + rows).to(tl.float32)
    total = rounded(total, y)
    if HAS_RESIDUAL:
        total = rounded(total * residual_scale, y) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return total
