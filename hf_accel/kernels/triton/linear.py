"""Products of 1 to 32 rows with dense weights, on a GPU: up to three weights that share an input, or a gate and an up.

Cost: the weights are read once. One row: every program sums whole rows of the weight, so that its threads hold several
16-byte loads each in flight; more rows: tensor cores, the weight as their second operand, so that no tile of 64 rows
must be filled. Sums are fp32; what eager code stores between two operations is rounded to the dtype at the same point.
Twins: `hf_accel.ops.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel.kernels.triton import on_its_device, tuning
from hf_accel.kernels.triton.activation import KINDS, activated, finished, product, rounded

MAX_ROWS = 32
MAX_PARTS = 3


@triton.jit
def _one_row(
    x, w0, w1, w2, b0, b1, b2, residual, y, n0, n1, n2, s0, s1, s2, residual_scale,
    K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    w, bias, n, stride, base, row = w0, b0, n0, s0, 0, program * BLOCK_N
    if PARTS > 1 and KIND == 0:
        first = tl.cdiv(n0, BLOCK_N)
        if program >= first:
            w, bias, n, stride, base, row = w1, b1, n1, s1, n0, (program - first) * BLOCK_N
        if PARTS > 2:
            second = first + tl.cdiv(n1, BLOCK_N)
            if program >= second:
                w, bias, n, stride, base, row = w2, b2, n2, s2, n0 + n1, (program - second) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    mask = rows < n
    rows = tl.minimum(rows, n - 1)
    lanes = tl.arange(0, BLOCK_K)
    at = w + rows[:, None].to(tl.int64) * stride + lanes[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if KIND > 0:
        at_up = w1 + rows[:, None].to(tl.int64) * s1 + lanes[None, :]
        total_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            some = tl.load(x + k + lanes).to(tl.float32)
            total += tl.load(at + k).to(tl.float32) * some[None, :]
            if KIND > 0:
                total_up += tl.load(at_up + k).to(tl.float32) * some[None, :]
        else:
            inside = k + lanes < K
            some = tl.load(x + k + lanes, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(at + k, mask=inside[None, :], other=0.0).to(tl.float32) * some[None, :]
            if KIND > 0:
                total_up += tl.load(at_up + k, mask=inside[None, :], other=0.0).to(tl.float32) * some[None, :]
    result = finished(tl.sum(total, axis=1), bias, residual, residual_scale, rows, base + rows, mask, HAS_BIAS,
                      HAS_RESIDUAL, y)  # fmt: skip
    if KIND > 0:
        up = finished(tl.sum(total_up, axis=1), b1, residual, residual_scale, rows, rows, mask, HAS_BIAS, False, y)
        result = rounded(activated(result, KIND), y) * up
    tl.store(y + base + rows, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _few_rows(
    x, w0, w1, w2, b0, b1, b2, residual, y, n0, n1, n2, s0, s1, s2, residual_scale, m, width,
    K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    w, bias, n, stride, base, row = w0, b0, n0, s0, 0, program * BLOCK_N
    if PARTS > 1 and KIND == 0:
        first = tl.cdiv(n0, BLOCK_N)
        if program >= first:
            w, bias, n, stride, base, row = w1, b1, n1, s1, n0, (program - first) * BLOCK_N
        if PARTS > 2:
            second = first + tl.cdiv(n1, BLOCK_N)
            if program >= second:
                w, bias, n, stride, base, row = w2, b2, n2, s2, n0 + n1, (program - second) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    mask = rows < n
    rows = tl.minimum(rows, n - 1)
    lanes = tl.arange(0, BLOCK_K)
    inputs = tl.arange(0, BLOCK_M)
    at_x = x + inputs[:, None] * K + lanes[None, :]
    at = w + rows[None, :].to(tl.int64) * stride + lanes[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if KIND > 0:
        at_up = w1 + rows[None, :].to(tl.int64) * s1 + lanes[:, None]
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            some = tl.load(at_x + k, mask=inputs[:, None] < m, other=0.0)
            total = product(some, tl.load(at + k), total, PRECISION)
            if KIND > 0:
                total_up = product(some, tl.load(at_up + k), total_up, PRECISION)
        else:
            inside = k + lanes < K
            some = tl.load(at_x + k, mask=(inputs[:, None] < m) & inside[None, :], other=0.0)
            total = product(some, tl.load(at + k, mask=inside[:, None], other=0.0), total, PRECISION)
            if KIND > 0:
                total_up = product(some, tl.load(at_up + k, mask=inside[:, None], other=0.0), total_up, PRECISION)
    places = inputs[:, None] * width + base + rows[None, :]
    mask = (inputs[:, None] < m) & mask[None, :]
    columns = rows[None, :]
    result = finished(total, bias, residual, residual_scale, columns, places, mask, HAS_BIAS, HAS_RESIDUAL, y)
    if KIND > 0:
        up = finished(total_up, b1, residual, residual_scale, columns, places, mask, HAS_BIAS, False, y)
        result = rounded(activated(result, KIND), y) * up
    tl.store(y + places, result.to(y.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return x W_iᵀ + b_i side by side, [..., sum of N_i]; scaled and added to `residual` of that shape where given.

    x [..., K] contiguous, 1 to 32 rows; weights: one to three [N_i, K], rows in one piece, all of the dtype of x;
    biases: all or none, [N_i].
    """
    return _launched(x, weights, biases, residual, residual_scale, None, config)


def gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    biases: Sequence[Tensor | None] | None = None,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return activation(x gateᵀ) · (x upᵀ), [..., N]; gate and up [N, K]."""
    return _launched(x, (gate, up), biases, None, 1.0, activation, config)


@on_its_device
def _launched(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    residual: Tensor | None,
    residual_scale: float,
    activation: str | None,
    config: tuning.Config | None,
) -> Tensor:
    x = x.contiguous()
    inner = x.shape[-1]
    rows = x.numel() // inner
    sizes = [weight.shape[0] for weight in weights]
    parts, width = len(weights), sizes[0] if activation else sum(sizes)
    if config is None:
        key = _key(x, weights, activation)
        config = tuning.chosen("linear", x.device, x.dtype, key, defaults(rows, width, inner, parts, activation, x))
    kept = [*weights, *[weights[0]] * (MAX_PARTS - parts)]
    has_bias = biases is not None and biases[0] is not None
    added = [x] * MAX_PARTS if biases is None or not has_bias else [*biases, *[biases[0]] * (MAX_PARTS - parts)]
    counts = [*sizes, *[0] * (MAX_PARTS - parts)]
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    per_program = config["BLOCK_N"]
    programs = -(-width // per_program) if activation else sum(-(-size // per_program) for size in sizes)
    arguments = (x, *kept, *added, x if residual is None else residual, y, *counts,
                 *(weight.stride(0) for weight in kept), residual_scale)  # fmt: skip
    constants = {
        "K": inner,
        "PARTS": parts,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": residual is not None,
        "KIND": KINDS[activation],
    }
    if "STAGES" in config:
        _one_row[(programs,)](*arguments, **constants, **config)
    else:
        precision = "ieee" if x.dtype is torch.float32 else "tf32"
        _few_rows[(programs,)](
            *arguments, rows, width, **constants, PRECISION=precision, BLOCK_M=16 if rows <= 16 else 32, **config
        )
    return y


def _key(x: Tensor, weights: Sequence[Tensor], activation: str | None) -> tuple[Any, ...]:
    inner = x.shape[-1]
    width = sum(weight.shape[0] for weight in weights)
    return x.numel() // inner, width, inner, len(weights), activation is not None


def tune(x: Tensor, weights: Sequence[Tensor], activation: str | None = None) -> tuning.Config | None:
    """Return the fastest configuration of `linear`, or with an activation of `gated`, and keep it for this device."""

    def seconds(config: tuning.Config) -> float:
        return tuning.seconds_of(lambda: _launched(x, weights, None, None, 1.0, activation, config), x.device)

    inner = x.shape[-1]
    tried = candidates(x.numel() // inner, inner)
    return tuning.tune("linear", x.device, x.dtype, _key(x, weights, activation), tried, seconds)


def defaults(rows: int, width: int, inner: int, parts: int, activation: str | None, x: Tensor) -> tuning.Config:
    """Return the configuration that runs untuned."""
    most = triton.next_power_of_2(inner)
    if rows == 1:
        block = 2 if activation or width < 8192 else 4
        return {"BLOCK_N": block, "BLOCK_K": min(2048 if block == 2 else 1024, most), "STAGES": 1, "num_warps": 4}
    size = 16 if width < 4096 or activation else 32
    return {"BLOCK_N": size, "BLOCK_K": min(256 // (x.element_size() // 2), max(16, most)), "num_warps": 4,
            "num_stages": 4}  # fmt: skip


def candidates(rows: int, inner: int) -> list[tuning.Config]:
    """Return the configurations that tuning tries."""
    most = triton.next_power_of_2(inner)
    found: list[tuning.Config] = []
    if rows == 1:
        found += [
            {"BLOCK_N": n, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
            for n, k, warps, stages in (
                (1, 2048, 4, 1), (1, 4096, 4, 1), (2, 1024, 4, 1), (2, 2048, 4, 1), (2, 2048, 8, 1), (4, 512, 2, 1),
                (4, 1024, 4, 1), (4, 2048, 8, 1), (8, 512, 4, 1), (8, 1024, 8, 1), (2, 1024, 4, 4), (4, 1024, 4, 4),
                (8, 512, 4, 4), (16, 256, 4, 4),
            )
            if k <= most
        ]  # fmt: skip
    found += [
        {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in (
            (16, 256, 2, 4), (16, 512, 4, 4), (32, 128, 4, 5), (32, 256, 4, 4), (64, 128, 4, 5), (64, 256, 4, 3),
            (64, 128, 8, 4), (128, 64, 4, 5),
        )
        if k <= most
    ]  # fmt: skip
    return found
