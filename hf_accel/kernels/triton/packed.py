"""Products of 1 to 32 rows with packed weights of 8, 4 and 2 bits and of MXFP4, on a GPU, in the layout they lie in.

A word of a row (`_WORD` bytes) holds 2 to 16 columns of it, and the words of sixteen rows lie side by side: a thread's
16 bytes are neighbouring rows. Codes become floats exactly and are summed in fp32; a group's scale multiplies the sum
of the group, so that only sums are rounded, and activations are read in their dtype. One row: as many operations per
code as bits and exponents allow (4 bits: shift, mask, multiply-add), over whole rows; more rows: tensor cores on the
codes. Twin: `hf_accel.ops.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel.kernels.layout import LANES, QUANTUM
from hf_accel.kernels.triton import tuning
from hf_accel.kernels.triton.activation import KINDS, activated, finished, product, rounded
from hf_accel.kernels.weights import PackedWeight

MAX_ROWS = 32
MAX_PARTS = 3
BITS = (8, 4, 2)
_WORDS = {8: torch.int16, 4: torch.int32, 2: torch.int32}
_FP4 = 4 + 16  # the number that stands for MXFP4 in kernels, beside bits
# activations that one load brings, as integers, by whether they are to be read one by one, and are two per word
_TOGETHER = {(True, True): (1, None), (True, False): (1, None), (False, True): (2, torch.int32),
             (False, False): (4, torch.int64)}  # fmt: skip
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_OF_HALF = tl.constexpr(32768.0)  # what the smallest fp4 value, as fp16, is to its code


@triton.jit
def _scales(scales, at, mask, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scales, fp32: bits of bf16 (int16) or fp32 (int32), or exponents (uint8)."""
    found = tl.load(scales + at, mask=mask, other=0)
    if FORMAT == 20:
        wide = found.to(tl.int32)
        return tl.where(wide < 2, (wide + 1) << 21, (wide - 1) << 23).to(tl.float32, bitcast=True)
    elif scales.dtype.element_ty == tl.int16:
        return found.to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        return found.to(tl.float32, bitcast=True)


@triton.jit
def _part(
    x, codes, scales, offsets, row,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, IN_GROUP: tl.constexpr, TOGETHER: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Return the sums of BLOCK_N rows from `row` on for one row of activations, fp32 [BLOCK_N].

    A tile is BLOCK_J words of these rows; IN_GROUP of them are of one group. Each thread holds all codes of its words.
    """
    EACH: tl.constexpr = 2 if FORMAT == 8 else 4  # columns that lie side by side in a word
    PER: tl.constexpr = 2 if FORMAT == 8 else (8 if FORMAT == 20 else 32 // FORMAT)  # columns of a word
    STEP: tl.constexpr = 4 if FORMAT == 20 else FORMAT
    WORDS: tl.constexpr = (K + 31) // 32 * 32 // PER
    TILE: tl.constexpr = BLOCK_J // IN_GROUP
    rows = row + tl.arange(0, BLOCK_N)
    places = (rows // 16).to(tl.int64) * (WORDS * 16) + rows % 16
    scale_rows = rows // 16 * (GROUPS * 16) + rows % 16
    groups = tl.arange(0, TILE)
    lanes = groups[:, None] * IN_GROUP + tl.arange(0, IN_GROUP)[None, :]
    total = tl.zeros((TILE, IN_GROUP, BLOCK_N), tl.float32)
    for start in tl.range(0, WORDS, BLOCK_J, num_stages=STAGES):
        j = start + lanes
        at = codes + places[None, None, :] + j[:, :, None] * 16
        if WORDS % BLOCK_J == 0:
            words = tl.load(at)
        else:
            words = tl.load(at, mask=j[:, :, None] < WORDS, other=0)
        group = tl.minimum((start + groups * IN_GROUP) * PER // GROUP, GROUPS - 1)
        scale = _scales(scales, group[:, None] * 16 + scale_rows[None, :], True, FORMAT)
        dots = tl.zeros((TILE, IN_GROUP, BLOCK_N), tl.float32)
        sums = tl.zeros((TILE, IN_GROUP), tl.float32)
        for several in tl.static_range(PER // TOGETHER):
            if K % (PER * BLOCK_J) == 0:
                found = tl.load(x + j * (PER // TOGETHER) + several)
            else:
                inside = j * PER + several * TOGETHER < K
                found = tl.load(x + j * (PER // TOGETHER) + several, mask=inside, other=0)
            for one in tl.static_range(TOGETHER):
                column = several * TOGETHER + one
                if TOGETHER == 1:
                    some = found.to(tl.float32)
                else:
                    some = (found >> (16 * one)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
                sums += some
                values = _values(words, 8 * (column % EACH) + STEP * (column // EACH), FORMAT)
                dots += values * some[:, :, None]
        if FORMAT == 4 or FORMAT == 2:  # 1.5 is taken off the sum, not off every value
            dots = (dots - 1.5 * sums[:, :, None]) * (1 << FORMAT)
        total += dots * scale[:, None, :]
        if HAS_OFFSETS:
            offset = tl.load(offsets + group[:, None] * 16 + scale_rows[None, :]).to(tl.float32, bitcast=True)
            total += sums[:, :, None] * offset[:, None, :]
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def _values(words, shift, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes at places of words, as fp32; of 4 and 2 bits 1 + stored / 2^bits."""
    if FORMAT == 8:  # int16: two signed bytes
        return ((words.to(tl.int32) << (24 - shift)) >> 24).to(tl.float32)
    elif FORMAT == 20:
        return _fp4(words >> shift)
    else:
        # the stored code is the top of the fraction of a float between 1 and 2
        stored = (words >> shift) & ((1 << FORMAT) - 1)
        return ((stored << (23 - FORMAT)) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _fp4(pattern):  # type: ignore[no-untyped-def]
    """Return the codes of patterns: their magnitude is the top of an fp16 value's exponent and fraction."""
    half = ((pattern & 7) << 9) | ((pattern & 8) << 12)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * _OF_HALF


@triton.jit
def _one_row(
    x, c0, c1, c2, s0, s1, s2, o0, o1, o2, b0, b1, b2, residual, y, n0, n1, n2, residual_scale,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, IN_GROUP: tl.constexpr, TOGETHER: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    program = tl.program_id(0)
    c, s, o, bias, n, base, row = c0, s0, o0, b0, n0, 0, program * BLOCK_N
    if PARTS > 1 and KIND == 0:
        first = tl.cdiv(n0, BLOCK_N)
        if program >= first:
            c, s, o, bias, n, base, row = c1, s1, o1, b1, n1, n0, (program - first) * BLOCK_N
        if PARTS > 2:
            second = first + tl.cdiv(n1, BLOCK_N)
            if program >= second:
                c, s, o, bias, n, base, row = c2, s2, o2, b2, n2, n0 + n1, (program - second) * BLOCK_N
    total = _part(
        x, c, s, o, row, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, BLOCK_N, BLOCK_J, IN_GROUP, TOGETHER, DTYPE, STAGES
    )
    rows = row + tl.arange(0, BLOCK_N)
    mask = rows < n
    rows = tl.minimum(rows, n - 1)
    result = finished(total, bias, residual, residual_scale, rows, base + rows, mask, HAS_BIAS, HAS_RESIDUAL, y)
    if KIND > 0:
        total = _part(
            x, c1, s1, o1, row, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, BLOCK_N, BLOCK_J, IN_GROUP, TOGETHER, DTYPE,
            STAGES,
        )
        up = finished(total, b1, residual, residual_scale, rows, rows, mask, HAS_BIAS, False, y)
        result = rounded(activated(result, KIND), y) * up
    tl.store(y + base + rows, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _code(words, SHIFT: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes at one place of words in a dtype that holds them exactly."""
    values = _values(words, SHIFT, FORMAT)
    if FORMAT == 4 or FORMAT == 2:
        values = (values - 1.5) * (1 << FORMAT)
    return values.to(dtype)


@triton.jit
def _tile(words, FORMAT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Return the codes of words [BLOCK_J, BLOCK_N] in the order of their columns, [columns, BLOCK_N]."""
    if FORMAT == 8:
        tile = tl.join(_code(words, 0, 8, dtype), _code(words, 8, 8, dtype))  # [J, N, 2]
        return tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_J * 2, BLOCK_N))
    elif FORMAT == 2:
        low = tl.join(_four(words, 0, 2, dtype), _four(words, 2, 2, dtype))
        high = tl.join(_four(words, 4, 2, dtype), _four(words, 6, 2, dtype))
        return tl.reshape(tl.permute(tl.join(low, high), (0, 5, 4, 3, 2, 1)), (BLOCK_J * 16, BLOCK_N))
    else:
        tile = tl.join(_four(words, 0, FORMAT, dtype), _four(words, 4, FORMAT, dtype))
        return tl.reshape(tl.permute(tile, (0, 4, 3, 2, 1)), (BLOCK_J * 8, BLOCK_N))


@triton.jit
def _four(words, SHIFT: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of the four bytes of words, [J, N, 2 (low bit of the byte's number), 2 (high bit)]."""
    even = tl.join(_code(words, SHIFT, FORMAT, dtype), _code(words, SHIFT + 8, FORMAT, dtype))
    odd = tl.join(_code(words, SHIFT + 16, FORMAT, dtype), _code(words, SHIFT + 24, FORMAT, dtype))
    return tl.join(even, odd)


@triton.jit
def _sums(
    x, codes, scales, offsets, row, n, m,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Return the sums [BLOCK_M, BLOCK_N] of rows from `row` on; BLOCK_K divides the group, or a row is one group."""
    PER: tl.constexpr = 2 if FORMAT == 8 else (8 if FORMAT == 20 else 32 // FORMAT)
    WORDS: tl.constexpr = (K + 31) // 32 * 32 // PER
    BLOCK_J: tl.constexpr = BLOCK_K // PER
    rows = row + tl.arange(0, BLOCK_N)
    stop = tl.cdiv(n, 16) * 16
    places = (rows // 16).to(tl.int64) * (WORDS * 16) + rows % 16
    scale_rows = rows // 16 * (GROUPS * 16) + rows % 16
    lanes = tl.arange(0, BLOCK_J)
    columns = tl.arange(0, BLOCK_K)
    inputs = tl.arange(0, BLOCK_M)
    at_x = x + inputs[:, None] * K + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        j = k // PER + lanes
        at = codes + places[None, :] + j[:, None] * 16
        if K % BLOCK_K == 0 and BLOCK_N == 16:
            words = tl.load(at)
        else:
            words = tl.load(at, mask=(rows[None, :] < stop) & (j[:, None] < WORDS), other=0)
        if K % BLOCK_K == 0:
            some = tl.load(at_x + k, mask=inputs[:, None] < m, other=0.0)
        else:
            some = tl.load(at_x + k, mask=(inputs[:, None] < m) & (k + columns[None, :] < K), other=0.0)
        tile = _tile(words, FORMAT, BLOCK_J, BLOCK_N, x.dtype.element_ty)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        group = tl.minimum(k // GROUP, GROUPS - 1)
        scale = _scales(scales, group * 16 + scale_rows, rows < stop, FORMAT)
        total += product(some, tile, zero, PRECISION) * scale[None, :]
        if HAS_OFFSETS:
            offset = tl.load(offsets + group * 16 + scale_rows, mask=rows < stop, other=0).to(tl.float32, bitcast=True)
            total += tl.sum(some.to(tl.float32), axis=1)[:, None] * offset[None, :]
    return total


@triton.jit
def _few_rows(
    x, c0, c1, c2, s0, s1, s2, o0, o1, o2, b0, b1, b2, residual, y, n0, n1, n2, residual_scale, m, width,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    program = tl.program_id(0)
    c, s, o, bias, n, base, row = c0, s0, o0, b0, n0, 0, program * BLOCK_N
    if PARTS > 1 and KIND == 0:
        first = tl.cdiv(n0, BLOCK_N)
        if program >= first:
            c, s, o, bias, n, base, row = c1, s1, o1, b1, n1, n0, (program - first) * BLOCK_N
        if PARTS > 2:
            second = first + tl.cdiv(n1, BLOCK_N)
            if program >= second:
                c, s, o, bias, n, base, row = c2, s2, o2, b2, n2, n0 + n1, (program - second) * BLOCK_N
    total = _sums(x, c, s, o, row, n, m, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    rows = row + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_M)
    mask = (inputs[:, None] < m) & (rows[None, :] < n)
    columns = tl.minimum(rows, n - 1)[None, :]
    places = inputs[:, None] * width + base + columns
    result = finished(total, bias, residual, residual_scale, columns, places, mask, HAS_BIAS, HAS_RESIDUAL, y)
    if KIND > 0:
        total = _sums(
            x, c1, s1, o1, row, n, m, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        up = finished(total, b1, residual, residual_scale, columns, places, mask, HAS_BIAS, False, y)
        result = rounded(activated(result, KIND), y) * up
    tl.store(y + places, result.to(y.dtype.element_ty), mask=mask)


def is_served(weight: PackedWeight) -> bool:
    """Return whether there is a kernel for a weight: 3 bits have none."""
    return weight.scheme.bits in BITS


def linear(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return x W_iᵀ + b_i side by side, as the dense product of the same name in `linear`; one scheme for all weights."""
    return _launched(x, weights, biases, residual, residual_scale, None, config)


def gated(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    activation: str,
    biases: Sequence[Tensor | None] | None = None,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return activation(x gateᵀ) · (x upᵀ), [..., N]."""
    return _launched(x, (gate, up), biases, None, 1.0, activation, config)


def _launched(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None,
    residual: Tensor | None,
    residual_scale: float,
    activation: str | None,
    config: tuning.Config | None,
) -> Tensor:
    inner = x.shape[-1]
    rows = x.numel() // inner
    scheme = weights[0].scheme
    sizes = [weight.rows for weight in weights]
    parts, width = len(weights), sizes[0] if activation else sum(sizes)
    group = -(-inner // QUANTUM) * QUANTUM if scheme.group_size is None else scheme.group_size
    number = _FP4 if scheme.code_book else scheme.bits
    if config is None:
        key = (rows, width, inner, parts, activation is not None, scheme.code_book or scheme.bits, group)
        config = tuning.chosen("packed", x.device, x.dtype, key, defaults(rows, width, inner, group, number))
    kept = [*weights, *[weights[0]] * (MAX_PARTS - parts)]
    codes = [weight.codes.view(_WORDS[scheme.bits]) for weight in kept]
    offsets = [weight.scales if weight.offsets is None else weight.offsets for weight in kept]
    has_bias = biases is not None and biases[0] is not None
    added = [*biases, *[biases[0]] * (MAX_PARTS - parts)] if has_bias else [x] * MAX_PARTS  # type: ignore[misc]
    counts = [*sizes, *[0] * (MAX_PARTS - parts)]
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    per_program = config["BLOCK_N"]
    programs = -(-width // per_program) if activation else sum(-(-size // per_program) for size in sizes)
    arguments = (x, *codes, *(weight.scales for weight in kept), *offsets, *added,
                 x if residual is None else residual, y, *counts, residual_scale)  # fmt: skip
    constants: dict[str, Any] = {
        "K": inner,
        "GROUP": group,
        "GROUPS": weights[0].scales.shape[1],
        "FORMAT": number,
        "HAS_OFFSETS": weights[0].offsets is not None,
        "PARTS": parts,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": residual is not None,
        "KIND": KINDS[activation],
    }
    if "STAGES" in config:
        together, integers = _TOGETHER[x.element_size() > 2 or inner % 4 != 0, number == 8]
        constants |= {"TOGETHER": together, "DTYPE": _DTYPES[x.dtype]}
        if integers is not None:
            arguments = (x.view(-1).view(integers), *arguments[1:])
        constants["IN_GROUP"] = min(config["BLOCK_J"], max(1, (group & -group) // _columns(number)))
        _one_row[(programs,)](*arguments, **constants, **config)
    else:
        precision = "ieee" if x.dtype is torch.float32 else "tf32"
        _few_rows[(programs,)](
            *arguments, rows, width, **constants, PRECISION=precision, BLOCK_M=16 if rows <= 16 else 32, **config
        )
    return y


def _columns(number: int) -> int:
    """Return the columns of a word."""
    return {8: 2, _FP4: 8}.get(number, 32 // number)


def defaults(rows: int, width: int, inner: int, group: int, number: int) -> tuning.Config:
    """Return the configuration that runs untuned."""
    words = triton.next_power_of_2(-(-inner // QUANTUM) * QUANTUM // _columns(number))
    if rows == 1:
        return {"BLOCK_N": LANES, "BLOCK_J": min(256, words), "STAGES": 1, "num_warps": 8}
    return {"BLOCK_N": 32, "BLOCK_K": _block(group, 128), "num_warps": 4, "num_stages": 5}


def _block(group: int, most: int) -> int:
    """Return the largest power of two that divides a group, from 32 to `most`."""
    return max(32, min(most, group & -group))


def candidates(rows: int, inner: int, group: int, number: int) -> list[tuning.Config]:
    """Return the configurations that tuning tries."""
    words = triton.next_power_of_2(-(-inner // QUANTUM) * QUANTUM // _columns(number))
    found: list[tuning.Config] = []
    if rows == 1:
        found += [
            {"BLOCK_N": LANES, "BLOCK_J": j, "STAGES": stages, "num_warps": warps}
            for j, warps, stages in ((64, 4, 1), (64, 2, 4), (128, 4, 1), (128, 4, 3), (128, 8, 1), (256, 4, 1), (256, 8, 1),
                                     (256, 8, 3), (512, 8, 1), (512, 16, 1))
            if j <= words
        ]
    found += [
        {"BLOCK_N": n, "BLOCK_K": _block(group, k), "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in ((16, 128, 1, 6), (16, 128, 2, 6), (32, 128, 2, 5), (32, 128, 4, 5), (64, 128, 4, 5),
                                    (64, 64, 4, 5), (128, 128, 8, 4))
    ]  # fmt: skip
    return found
