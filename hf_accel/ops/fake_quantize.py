"""Fake quantization: a weight in floating point is rounded to its codes and back; gradients reach it and its scales.

One formula serves training, conversion and saving: `learned_scales` and `learned_affine` decide on scales and codes,
and fake quantization is the dequantized `learned_affine`, so that what is deployed is what was trained, bit for bit.

Gradients (Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153, section 2): with v = w / s, to the
weight they pass straight through where v is not clipped; to the scale the slope is code - v there, and the bound
where it is clipped, times 1 / sqrt(weights of the scale · highest code). Two things differ: a value counts as clipped
from half a step beyond the outermost code, where rounding ends, not from the code itself; and what is learned is the
logarithm of s over its start, so that one learning rate suits scales of any size, and weight decay leads back to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme, dequantize, encode

INSIDE = 0.25  # of a step, how far from its code a weight may lie when training starts: see `inside`
PACE = 2.0  # scales are the start's times exp(PACE · log factor): how much faster they move than weights


def learned_scales(start: Tensor, log_factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales start · exp(PACE · log_factors) [N, groups] in fp32, rounded to values of `dtype`."""
    return (start.float() * (PACE * log_factors.float()).exp()).to(dtype).float()


def learned_affine(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Affine:
    """Return codes, scales and zeros of a weight [N, K] of any float dtype, by the scales of `learned_scales`."""
    return Affine(_codes(weight, scales, zeros, scheme).flatten(1).to(torch.int8), scales, zeros, scheme)


def fake_quantized(
    weight: Tensor,
    start: Tensor,
    log_factors: Tensor,
    zeros: Tensor | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [N, K] in `dtype` that the codes of `weight` stand for; gradients are those described above.

    Args:
        weight: [N, K], any float dtype.
        start: the scales at the start of training [N, groups], fp32.
        log_factors: what is learned of them [N, groups]: they are multiplied by exp(PACE · log_factors).
        zeros: int8 [N, groups], None if symmetric; they are not learned.
        scale_dtype: scales are rounded to values of it.
    """
    return _FakeQuantized.apply(weight, start, log_factors, zeros, scheme, scale_dtype, dtype)  # type: ignore[no-any-return]


def inside(weight: Tensor, start: Affine) -> Tensor:
    """Return the fp32 weight [N, K] next to `weight` that is at most `INSIDE` of a step from the codes of `start`.

    Codes of a calibrated start are often not those next to the weight, and weights beyond the outermost codes get no
    gradient; trained from here, each weight begins with the code it was given, and none is clipped.
    """
    shape = (*start.scales.shape, -1)
    steps = start.codes.view(shape).float()
    if start.zeros is not None:
        steps = steps - start.zeros[..., None].float()
    scales = start.scales[..., None].float()
    steps = (weight.float().view(shape) / scales).clamp(steps - INSIDE, steps + INSIDE)
    return (steps * scales).view(weight.shape)


def clipped(weight: Tensor, quantized: Affine) -> Tensor:
    """Return where a weight [N, K] lies beyond the outermost codes by more than half a step, bool [N, K]."""
    return _outside(_values(weight, quantized.scales), quantized.zeros, quantized.scheme).flatten(1)


def _values(weight: Tensor, scales: Tensor) -> Tensor:
    """Return a weight in steps of its scales, fp32 [N, groups, group]."""
    return weight.detach().float().reshape(*scales.shape, -1) / scales[..., None]


def _codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Return codes as floats [N, groups, group]."""
    grouped = weight.detach().float().reshape(*scales.shape, -1)
    return encode(grouped, scales[..., None], None if zeros is None else zeros[..., None].float(), scheme)


def _outside(values: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    codes = values if zeros is None else values + zeros[..., None].float()
    return (codes < scheme.lowest - 0.5) | (codes > scheme.highest + 0.5)


class _FakeQuantized(torch.autograd.Function):
    """Keeps the weight and its scales for the way back, and makes the codes anew there: no memory of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        start: Tensor,
        log_factors: Tensor,
        zeros: Tensor | None,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        scales = learned_scales(start, log_factors, scale_dtype)
        ctx.save_for_backward(weight, scales, zeros)
        ctx.scheme, ctx.log_dtype = scheme, log_factors.dtype
        return dequantize(learned_affine(weight, scales, zeros, scheme), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, scales, zeros = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        to_weight = to_scales = None
        values = _values(weight, scales)
        outside = _outside(values, zeros, scheme)
        gradient = gradients[0].float().reshape(values.shape)
        if ctx.needs_input_grad[2]:
            steps = _codes(weight, scales, zeros, scheme)
            steps = steps if zeros is None else steps - zeros[..., None].float()
            slope = torch.where(outside, steps, steps - values)
            share = 1 / math.sqrt(values.shape[-1] * max(1, scheme.highest))
            to_scales = ((gradient * slope).sum(-1) * scales * (PACE * share)).to(ctx.log_dtype)
        if ctx.needs_input_grad[0]:
            to_weight = gradient.masked_fill(outside, 0).view(weight.shape).to(weight.dtype)
        return to_weight, None, to_scales, None, None, None, None
