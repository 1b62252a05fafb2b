"""The kernels of decode attention: each split of the keys by itself, and their merge."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel.kernels.triton.activation import INTERPRETED, product

_NEVER = tl.constexpr(float("-inf"))
# four signed bytes -> bf16: each, made unsigned, is the end of the fraction of a float from 2^23 on
_EIGHT = tl.constexpr("""{
.reg .b32 bytes, a, b, c, d; .reg .f32 e, f, g, h;
xor.b32 bytes, $2, 0x80808080;
prmt.b32 a, bytes, $3, 0x7440; prmt.b32 b, bytes, $3, 0x7441;
prmt.b32 c, bytes, $3, 0x7442; prmt.b32 d, bytes, $3, 0x7443;
mov.b32 e, a; mov.b32 f, b; mov.b32 g, c; mov.b32 h, d;
sub.f32 e, e, 0f4B000080; sub.f32 f, f, 0f4B000080; sub.f32 g, g, 0f4B000080; sub.f32 h, h, 0f4B000080;
cvt.rn.bf16x2.f32 $0, f, e; cvt.rn.bf16x2.f32 $1, h, g;
}""")
# the lower halves of four bytes, less 8, -> bf16: each is the end of the fraction of 128 to 143
_FOUR = tl.constexpr("""{
.reg .b32 bytes, a, b, middle;
and.b32 bytes, $2, 0x0F0F0F0F;
prmt.b32 a, bytes, $3, 0x7150; prmt.b32 b, bytes, $3, 0x7352;
mov.b32 middle, 0x43084308;
sub.rn.bf16x2 $0, a, middle; sub.rn.bf16x2 $1, b, middle;
}""")


@triton.jit
def _codes(rows, magic, HIGH: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of bytes in the dtype of the query: of 8 bits, or the lower or HIGH halves, less 8.

    magic: 0x4b000000 or 0x43434343, as a value that the compiler does not know, see `packed_codes.read_codes`. The
    conversion is written out so that it is done where bytes lie as they were loaded, not one by one in the order in
    which tensor cores take them.
    """
    if BITS == 4 and HIGH:
        rows = rows >> 4
    if INTERPRETED or dtype != tl.bfloat16:
        whole = rows.to(tl.float32) if BITS == 8 else (rows & 15).to(tl.float32) - 8.0
        return whole.to(dtype)
    elif BITS == 8:
        return tl.inline_asm_elementwise(
            _EIGHT, "=r,=r,r,r,r,r,r", [rows, magic], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _FOUR, "=r,=r,r,r,r,r,r", [rows, magic], dtype=tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def _turned(query, first, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr,
            ROOT: tl.constexpr):  # fmt: skip
    """Return columns [first, first + WIDTH) of query [M, BLOCK_D] times the matrix of `cached.rotate`, fp32."""
    i = tl.arange(0, BLOCK_D)[:, None]
    j = first + tl.arange(0, WIDTH)[None, :]
    common = i & j & (POWER - 1)
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    sign = tl.where((common & 1) == 1, -1.0, 1.0)
    sign = tl.where((i // POWER == j // POWER) & (i < SIZE) & (j < SIZE), sign, 0.0)
    zero = tl.zeros((query.shape[0], WIDTH), tl.float32)
    return product(query, sign.to(query.dtype), zero, "ieee") * ROOT


@triton.jit
def split_keys(
    query, keys, values, key_halves, value_halves, lengths, starts, out, partial, tops, sums,
    query_b, query_h, query_t, key_b, key_g, value_b, value_g, ratio, tokens, groups, scale, softcap, window, magic,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, ROW: tl.constexpr, ROW_V: tl.constexpr, BITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, POWER: tl.constexpr, ROOT: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries over one split of the columns of one row and group; see `decode_attention`."""
    split = tl.program_id(0)
    group = tl.program_id(1) // TILES
    batch = tl.program_id(2)
    rows = (tl.program_id(1) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)  # (head of the group, token)
    is_row = rows < ratio * tokens
    head = group * ratio + rows // tokens
    token = rows % tokens
    length = tl.load(lengths + batch)
    start = tl.load(starts + batch)
    first = start
    if HAS_WINDOW:
        first = tl.maximum(start, length - window + 1)
    stop = length + tokens
    share = tl.cdiv(tl.cdiv(stop - first, SPLITS), BLOCK_N) * BLOCK_N
    low = first + split * share
    high = tl.minimum(low + share, stop)
    query_heads = groups * ratio
    place = (batch * query_heads + head) * tokens + token
    if SPLITS > 1 and low >= high:
        tl.store(tops + place * SPLITS + split, tl.full((BLOCK_M,), _NEVER, tl.float32), mask=is_row)
        return
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_V)
    at = query + batch * query_b + head[:, None] * query_h + token[:, None] * query_t
    if BITS == 4:  # BLOCK_D and BLOCK_V are halves of a row
        wide = tl.arange(0, 2 * BLOCK_D)
        q = tl.load(at + wide[None, :], mask=is_row[:, None] & (wide[None, :] < SIZE), other=0.0)
        q_low = _turned(q, 0, SIZE, 2 * BLOCK_D, BLOCK_D, POWER, ROOT)
        q_high = _turned(q, SIZE // 2, SIZE, 2 * BLOCK_D, BLOCK_D, POWER, ROOT)
        q_low = tl.where(dims[None, :] < SIZE // 2, q_low, 0.0)
        q_low = q_low.to(q.dtype)
        q_high = q_high.to(q.dtype)
        q_sum = tl.sum(q_low.to(tl.float32), axis=1) + tl.sum(q_high.to(tl.float32), axis=1)
        total_high = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        lows = tl.zeros((BLOCK_M,), tl.float32)
    else:
        q = tl.load(at + dims[None, :], mask=is_row[:, None] & (dims[None, :] < SIZE), other=0.0)
    top = tl.full((BLOCK_M,), _NEVER, tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    keys += batch.to(tl.int64) * key_b + group.to(tl.int64) * key_g
    values += batch.to(tl.int64) * value_b + group.to(tl.int64) * value_g
    if BITS > 0:
        key_halves += (batch.to(tl.int64) * key_b + group.to(tl.int64) * key_g) // 2
        value_halves += (batch.to(tl.int64) * value_b + group.to(tl.int64) * value_g) // 2
    KEY_BYTES: tl.constexpr = SIZE // 2 if BITS == 4 else SIZE
    VALUE_BYTES: tl.constexpr = SIZE_V // 2 if BITS == 4 else SIZE_V
    for n in range(low, high, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        is_column = columns < high
        if KEY_BYTES == BLOCK_D:
            k = tl.load(keys + columns[None, :].to(tl.int64) * ROW + dims[:, None], mask=is_column[None, :], other=0)
        else:
            k = tl.load(keys + columns[None, :].to(tl.int64) * ROW + dims[:, None],
                        mask=is_column[None, :] & (dims[:, None] < KEY_BYTES), other=0)  # fmt: skip
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if BITS == 4:
            k_scale = tl.load(
                key_halves + columns.to(tl.int64) * (ROW // 2) + KEY_BYTES // 2, mask=is_column, other=0.0
            )
            k_low = tl.load(key_halves + columns.to(tl.int64) * (ROW // 2) + KEY_BYTES // 2 + 1, mask=is_column,
                            other=0.0)  # fmt: skip
            k_scale = k_scale.to(tl.float32)
            k_low = k_low.to(tl.float32) + 8.0 * k_scale  # codes are taken from their middle: less to cancel
            scores = product(q_low, _codes(k, magic, False, 4, q.dtype), zero, PRECISION)
            scores = product(q_high, _codes(k, magic, True, 4, q.dtype), scores, PRECISION)
            scores = scores * k_scale[None, :] + q_sum[:, None] * k_low[None, :]
        elif BITS == 8:
            k_scale = tl.load(key_halves + columns.to(tl.int64) * (ROW // 2) + SIZE // 2, mask=is_column, other=0.0)
            scores = product(q, _codes(k, magic, False, 8, q.dtype), zero, PRECISION) * k_scale.to(tl.float32)[None, :]
        else:
            scores = product(q, k, zero, PRECISION)
        scores = scores * scale
        if HAS_SOFTCAP:  # tanh u = 2 sigmoid(2 u) - 1
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        visible = is_column[None, :] & (columns[None, :] <= length + token[:, None])
        if HAS_WINDOW:
            visible = visible & (columns[None, :] > length + token[:, None] - window)
        scores = tl.where(visible, scores, _NEVER)
        new = tl.maximum(top, tl.max(scores, axis=1))
        shown = tl.where(new == _NEVER, 0.0, new)
        factor = tl.exp(top - shown)
        weights = tl.exp(scores - shown[:, None])
        mass = mass * factor + tl.sum(weights, axis=1)
        total = total * factor[:, None]
        if VALUE_BYTES == BLOCK_V:
            v = tl.load(values + columns[:, None].to(tl.int64) * ROW_V + dims_v[None, :], mask=is_column[:, None],
                        other=0)  # fmt: skip
        else:
            v = tl.load(values + columns[:, None].to(tl.int64) * ROW_V + dims_v[None, :],
                        mask=is_column[:, None] & (dims_v[None, :] < VALUE_BYTES), other=0)  # fmt: skip
        if BITS == 4:
            v_scale = tl.load(value_halves + columns.to(tl.int64) * (ROW_V // 2) + VALUE_BYTES // 2, mask=is_column,
                              other=0.0)  # fmt: skip
            v_low = tl.load(value_halves + columns.to(tl.int64) * (ROW_V // 2) + VALUE_BYTES // 2 + 1, mask=is_column,
                            other=0.0)  # fmt: skip
            v_scale = v_scale.to(tl.float32)
            v_low = v_low.to(tl.float32) + 8.0 * v_scale
            lows = lows * factor + tl.sum(weights * v_low[None, :], axis=1)
            scaled = (weights * v_scale[None, :]).to(q.dtype)
            total = product(scaled, _codes(v, magic, False, 4, q.dtype), total, PRECISION)
            total_high = product(scaled, _codes(v, magic, True, 4, q.dtype), total_high * factor[:, None], PRECISION)
        elif BITS == 8:
            v_scale = tl.load(value_halves + columns.to(tl.int64) * (ROW_V // 2) + SIZE_V // 2, mask=is_column,
                              other=0.0)  # fmt: skip
            scaled = (weights * v_scale.to(tl.float32)[None, :]).to(q.dtype)
            total = product(scaled, _codes(v, magic, False, 8, q.dtype), total, PRECISION)
        else:
            total = product(weights.to(v.dtype), v, total, PRECISION)
        top = new
    if BITS == 4:
        total += lows[:, None]
        total_high += lows[:, None]
    if SPLITS == 1:
        safe = tl.where(mass == 0.0, 1.0, mass)[:, None]
        at = out + ((batch * tokens + token) * query_heads + head)[:, None].to(tl.int64) * SIZE_V + dims_v[None, :]
        mask = is_row[:, None] & (dims_v[None, :] < VALUE_BYTES)
        tl.store(at, (total / safe).to(out.dtype.element_ty), mask=mask)
        if BITS == 4:
            tl.store(at + VALUE_BYTES, (total_high / safe).to(out.dtype.element_ty), mask=mask)
        tl.store(tops + place, top, mask=is_row)
        tl.store(sums + place, mass, mask=is_row)
    else:
        at = partial + (place[:, None].to(tl.int64) * SPLITS + split) * SIZE_V + dims_v[None, :]
        mask = is_row[:, None] & (dims_v[None, :] < VALUE_BYTES)
        tl.store(at, total, mask=mask)
        if BITS == 4:
            tl.store(at + VALUE_BYTES, total_high, mask=mask)
        tl.store(tops + place * SPLITS + split, top, mask=is_row)
        tl.store(sums + place * SPLITS + split, mass, mask=is_row)


@triton.jit
def merge(
    partial, tops, sums, sinks, out, tokens, query_heads,
    SIZE_V: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Attention of one query from its splits (Milakov and Gimelshein 2018, arXiv:1805.02867, eq. 4), and the sink."""
    place = tl.program_id(0)  # (row, head, token)
    token = place % tokens
    head = place // tokens % query_heads
    batch = place // (tokens * query_heads)
    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_V)
    top = tl.load(tops + place * SPLITS + splits, mask=splits < SPLITS, other=_NEVER)
    was = top > _NEVER
    was = was | (top != top)
    mass = tl.load(sums + place * SPLITS + splits, mask=was & (splits < SPLITS), other=0.0)
    most = tl.max(top, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        most = tl.maximum(most, sink)
    shown = tl.where(most == _NEVER, 0.0, most)
    factor = tl.where(was, tl.exp(top - shown), 0.0)
    whole = tl.sum(mass * factor, axis=0)
    if HAS_SINKS:
        whole += tl.exp(sink - shown)
    at = partial + (place.to(tl.int64) * SPLITS + splits[:, None]) * SIZE_V + dims[None, :]
    parts = tl.load(at, mask=was[:, None] & (splits[:, None] < SPLITS) & (dims[None, :] < SIZE_V), other=0.0)
    total = tl.sum(parts * factor[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    places = ((batch * tokens + token) * query_heads + head).to(tl.int64) * SIZE_V + dims
    tl.store(out + places, total.to(out.dtype.element_ty), mask=dims < SIZE_V)
