"""The kernels of products with packed weights, for one row of activations and for a few."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel.kernels.triton.activation import activated, finished, product, rounded
from hf_accel.kernels.triton.packed_codes import prepared, read_codes, read_scales, tile


@triton.jit
def _added(
    total, x, words, j, scale, offset, top,
    K: tl.constexpr, PER: tl.constexpr, EACH: tl.constexpr, IS_WHOLE: tl.constexpr, FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, TOGETHER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return total with the products of words and one row of activations added, for each word by itself."""
    dots = tl.zeros(total.shape, tl.float32)
    sums = tl.zeros(j.shape, tl.float32)
    for part in tl.static_range(PER // EACH):
        ready = prepared(words, part, FORMAT)
        for several in tl.static_range(EACH // TOGETHER):
            first = j * PER + (part * EACH + several * TOGETHER)
            if IS_WHOLE:
                found = tl.load(x + first // TOGETHER)
            else:
                found = tl.load(x + first // TOGETHER, mask=first < K, other=0)
            for one in tl.static_range(TOGETHER):
                if TOGETHER == 1:
                    some = found.to(tl.float32)
                else:
                    some = (found >> (16 * one)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
                sums += some
                dots += read_codes(ready, top, several * TOGETHER + one, FORMAT) * some[:, :, None]
    if FORMAT == 4 or FORMAT == 2:  # 1.5 is taken off the sum, not off every value
        dots = (dots - 1.5 * sums[:, :, None]) * (1 << FORMAT)
    total += dots * scale[:, None, :]
    if HAS_OFFSETS:
        total += sums[:, :, None] * offset[:, None, :]
    return total


@triton.jit
def _part(
    x, codes, scales, offsets, row, input, m, top,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, IN_GROUP: tl.constexpr, TOGETHER: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the sums of BLOCK_N rows from `row` on for 1, 2 or 4 rows of activations from `input` on, fp32 [BLOCK_N].

    A tile is BLOCK_J words of these rows; IN_GROUP of them are of one group. Each thread holds all codes of its words.
    """
    EACH: tl.constexpr = 2 if FORMAT == 8 else 4  # columns that lie side by side in a word
    PER: tl.constexpr = 2 if FORMAT == 8 else (8 if FORMAT == 20 else 32 // FORMAT)  # columns of a word
    WORDS: tl.constexpr = (K + 31) // 32 * 32 // PER
    TILE: tl.constexpr = BLOCK_J // IN_GROUP
    WHOLE: tl.constexpr = K % (PER * BLOCK_J) == 0
    rows = row + tl.arange(0, BLOCK_N)
    places = (rows // 16).to(tl.int64) * (WORDS * 16) + rows % 16
    scale_rows = rows // 16 * (GROUPS * 16) + rows % 16
    groups = tl.arange(0, TILE)
    lanes = groups[:, None] * IN_GROUP + tl.arange(0, IN_GROUP)[None, :]
    x0 = x + input * (K // TOGETHER)
    x1 = x + tl.minimum(input + 1, m - 1) * (K // TOGETHER)
    x2 = x + tl.minimum(input + 2, m - 1) * (K // TOGETHER)
    x3 = x + tl.minimum(input + 3, m - 1) * (K // TOGETHER)
    t0 = tl.zeros((TILE, IN_GROUP, BLOCK_N), tl.float32)
    t1 = t0
    t2 = t0
    t3 = t0
    for start in tl.range(0, WORDS, BLOCK_J, num_stages=STAGES):
        j = start + lanes
        at = codes + places[None, None, :] + j[:, :, None] * 16
        if WORDS % BLOCK_J == 0:
            words = tl.load(at)
        else:
            words = tl.load(at, mask=j[:, :, None] < WORDS, other=0)
        group = tl.minimum((start + groups * IN_GROUP) * PER // GROUP, GROUPS - 1)
        at_scale = group[:, None] * 16 + scale_rows[None, :]
        scale = read_scales(scales, at_scale, True, FORMAT)
        offset = scale
        if HAS_OFFSETS:
            offset = tl.load(offsets + at_scale).to(tl.float32, bitcast=True)
        t0 = _added(t0, x0, words, j, scale, offset, top, K, PER, EACH, WHOLE, FORMAT, HAS_OFFSETS, TOGETHER, DTYPE)
        if ROWS > 1:
            t1 = _added(t1, x1, words, j, scale, offset, top, K, PER, EACH, WHOLE, FORMAT, HAS_OFFSETS, TOGETHER, DTYPE)
        if ROWS > 2:
            t2 = _added(t2, x2, words, j, scale, offset, top, K, PER, EACH, WHOLE, FORMAT, HAS_OFFSETS, TOGETHER, DTYPE)
            t3 = _added(t3, x3, words, j, scale, offset, top, K, PER, EACH, WHOLE, FORMAT, HAS_OFFSETS, TOGETHER, DTYPE)
    s0 = tl.sum(tl.sum(t0, axis=1), axis=0)
    s1 = s0
    s2 = s0
    s3 = s0
    if ROWS > 1:
        s1 = tl.sum(tl.sum(t1, axis=1), axis=0)
    if ROWS > 2:
        s2 = tl.sum(tl.sum(t2, axis=1), axis=0)
        s3 = tl.sum(tl.sum(t3, axis=1), axis=0)
    return s0, s1, s2, s3


@triton.jit
def _stored(
    total, up, bias, bias_up, residual, residual_scale, y, rows, at, mask,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Store one row of products; with an activation, of gate and up."""
    result = finished(total, bias, residual, residual_scale, rows, at, mask, HAS_BIAS, HAS_RESIDUAL, y)
    if KIND > 0:
        up = finished(up, bias_up, residual, residual_scale, rows, at, mask, HAS_BIAS, False, y)
        result = rounded(activated(result, KIND), y) * up
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def one_row(
    x, c0, c1, c2, s0, s1, s2, o0, o1, o2, b0, b1, b2, residual, y, n0, n1, n2, residual_scale, top, m, width,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, IN_GROUP: tl.constexpr, TOGETHER: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of 1, 2 or 4 rows of activations with BLOCK_N rows of weights, without tensor cores."""
    input = tl.program_id(0) * ROWS  # programs that read the same weights follow one another
    program = tl.program_id(1)
    c, s, o, bias, n, base, row = c0, s0, o0, b0, n0, 0, program * BLOCK_N
    if PARTS > 1 and KIND == 0:
        first = tl.cdiv(n0, BLOCK_N)
        if program >= first:
            c, s, o, bias, n, base, row = c1, s1, o1, b1, n1, n0, (program - first) * BLOCK_N
        if PARTS > 2:
            second = first + tl.cdiv(n1, BLOCK_N)
            if program >= second:
                c, s, o, bias, n, base, row = c2, s2, o2, b2, n2, n0 + n1, (program - second) * BLOCK_N
    t0, t1, t2, t3 = _part(
        x, c, s, o, row, input, m, top, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, ROWS, BLOCK_N, BLOCK_J, IN_GROUP,
        TOGETHER, DTYPE, STAGES,
    )  # fmt: skip
    u0, u1, u2, u3 = t0, t1, t2, t3
    if KIND > 0:
        u0, u1, u2, u3 = _part(
            x, c1, s1, o1, row, input, m, top, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, ROWS, BLOCK_N, BLOCK_J, IN_GROUP,
            TOGETHER, DTYPE, STAGES,
        )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_N)
    mask = rows < n
    rows = tl.minimum(rows, n - 1)
    at = base + rows + input * width
    number = rows * 0 + input
    _stored(t0, u0, bias, b1, residual, residual_scale, y, rows, at, mask, HAS_BIAS, HAS_RESIDUAL, KIND)
    if ROWS > 1:
        mask1 = mask & (number + 1 < m)
        _stored(t1, u1, bias, b1, residual, residual_scale, y, rows, at + width, mask1, HAS_BIAS, HAS_RESIDUAL, KIND)
    if ROWS > 2:
        mask2 = mask & (number + 2 < m)
        at += 2 * width
        _stored(t2, u2, bias, b1, residual, residual_scale, y, rows, at, mask2, HAS_BIAS, HAS_RESIDUAL, KIND)
        mask3 = mask & (number + 3 < m)
        _stored(t3, u3, bias, b1, residual, residual_scale, y, rows, at + width, mask3, HAS_BIAS, HAS_RESIDUAL, KIND)


@triton.jit
def _sums(
    x, codes, scales, offsets, row, n, m, top,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
        codes_tile = tile(words, top, FORMAT, BLOCK_J, BLOCK_N, x.dtype.element_ty)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        group = tl.minimum(k // GROUP, GROUPS - 1)
        scale = read_scales(scales, group * 16 + scale_rows, rows < stop, FORMAT)
        total += product(some, codes_tile, zero, PRECISION) * scale[None, :]
        if HAS_OFFSETS:
            offset = tl.load(offsets + group * 16 + scale_rows, mask=rows < stop, other=0).to(tl.float32, bitcast=True)
            total += tl.sum(some.to(tl.float32), axis=1)[:, None] * offset[None, :]
    return total


@triton.jit
def few_rows(
    x, c0, c1, c2, s0, s1, s2, o0, o1, o2, b0, b1, b2, residual, y, n0, n1, n2, residual_scale, top, m, width,
    K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of up to BLOCK_M rows of activations with BLOCK_N rows of weights, by tensor cores."""
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
    total = _sums(
        x, c, s, o, row, n, m, top, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    rows = row + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_M)
    mask = (inputs[:, None] < m) & (rows[None, :] < n)
    columns = tl.minimum(rows, n - 1)[None, :]
    places = inputs[:, None] * width + base + columns
    result = finished(total, bias, residual, residual_scale, columns, places, mask, HAS_BIAS, HAS_RESIDUAL, y)
    if KIND > 0:
        total = _sums(
            x, c1, s1, o1, row, n, m, top, K, GROUP, GROUPS, FORMAT, HAS_OFFSETS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        up = finished(total, b1, residual, residual_scale, columns, places, mask, HAS_BIAS, False, y)
        result = rounded(activated(result, KIND), y) * up
    tl.store(y + places, result.to(y.dtype.element_ty), mask=mask)
