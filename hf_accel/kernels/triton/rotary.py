"""What stands between the q, k, v product and attention in one launch, on a GPU: norms of heads, rotary, cache write.

One program per head and token. Keys and values go to columns lengths[b] + t of a static cache, as values of the dtype
or encoded as `hf_accel.ops.cached` does. Twin: `hf_accel.ops.rotary`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel.kernels.triton import on_its_device
from hf_accel.kernels.triton.activation import rounded

_HALF = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds to whole numbers, ties to even


@triton.jit
def _whole(x, low, high):
    """Return x rounded to a whole number within bounds; NaN becomes 0."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum((tl.minimum(tl.maximum(x, -1e6), 1e6) + _HALF) - _HALF, low), high).to(tl.int32)


@triton.jit
def _bits_away(x, UP: tl.constexpr):
    """Return the bits of x rounded to bf16, away from zero where positive (UP) or else where negative."""
    bits = x.to(tl.int32, bitcast=True)
    moved = tl.where(x > 0.0 if UP else x < 0.0, 0xFFFF, 0)
    return (bits + moved) & -0x10000


@triton.jit
def _inverse(scale):
    inverse = tl.div_rn(1.0, scale)
    return tl.where((scale > 0.0) & (inverse <= 3.0e38), inverse, 0.0)


@triton.jit
def _write_8(x, at, dims, row, row_halves, SIZE: tl.constexpr):
    strange = tl.sum(x * 0.0, axis=0)  # NaN where a value is not finite
    bits = _bits_away(tl.div_rn(tl.max(tl.abs(x), axis=0) + strange, 127.0), True)
    codes = _whole(x * _inverse(bits.to(tl.float32, bitcast=True)), -127.0, 127.0)
    tl.store(row + dims, (codes & 255).to(tl.uint8), mask=dims < SIZE)
    tl.store(row_halves + SIZE // 2, (bits >> 16).to(tl.int16))


@triton.jit
def _write_4(low_half, high_half, dims, row, row_halves, SIZE: tl.constexpr):
    strange = tl.sum(low_half * 0.0 + high_half * 0.0, axis=0)
    inside = dims < SIZE // 2
    least = tl.min(tl.where(inside, tl.minimum(low_half, high_half), float("inf")), axis=0)
    most = tl.max(tl.where(inside, tl.maximum(low_half, high_half), float("-inf")), axis=0)
    low_bits = _bits_away(least + strange, False)
    low = low_bits.to(tl.float32, bitcast=True)
    bits = _bits_away(tl.div_rn(most - low, 15.0) + strange, True)
    inverse = _inverse(bits.to(tl.float32, bitcast=True))
    first = _whole((low_half - low) * inverse, 0.0, 15.0)
    second = _whole((high_half - low) * inverse, 0.0, 15.0)
    tl.store(row + dims, (first | (second << 4)).to(tl.uint8), mask=inside)
    tl.store(row_halves + SIZE // 4, (bits >> 16).to(tl.int16))
    tl.store(row_halves + SIZE // 4 + 1, (low_bits >> 16).to(tl.int16))


@triton.jit
def _turned(x, dims, first, SIZE: tl.constexpr, HALF: tl.constexpr, POWER: tl.constexpr, ROOT: tl.constexpr):
    """Return half a row of x times the Hadamard matrix of `cached.rotate`."""
    i = dims[:, None]
    j = first + tl.arange(0, HALF)[None, :]
    common = i & j & (POWER - 1)
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    turned = tl.where((common & 1) == 1, -x[:, None], x[:, None])
    return tl.sum(tl.where((i // POWER == j // POWER) & (i < SIZE), turned, 0.0), axis=0) * ROOT


@triton.jit
def _rotary(
    qkv, cos, sin, q_weight, k_weight, keys, values, key_halves, value_halves, lengths, query,
    tokens, heads, kv_heads, cos_b, cos_t, sin_b, sin_t, key_b, key_g, value_b, value_g, eps,
    SIZE: tl.constexpr, ROTARY: tl.constexpr, ROW: tl.constexpr, ROW_V: tl.constexpr, BITS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, IS_GEMMA: tl.constexpr, POWER: tl.constexpr,
    ROOT: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)  # (row, token)
    head = tl.program_id(1)
    batch = place // tokens
    token = place % tokens
    dims = tl.arange(0, BLOCK)
    inside = dims < SIZE
    width = (heads + 2 * kv_heads) * SIZE
    at = qkv + place.to(tl.int64) * width + head * SIZE
    if head < heads + kv_heads:
        x = tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)
        partner_at = tl.where(dims < ROTARY // 2, dims + ROTARY // 2, dims - ROTARY // 2)
        turns = dims < ROTARY
        partner = tl.load(at + partner_at, mask=turns, other=0.0).to(tl.float32)
        if HAS_Q_NORM or HAS_K_NORM:
            weight = q_weight
            is_normed = HAS_Q_NORM
            if head >= heads:
                weight = k_weight
                is_normed = HAS_K_NORM
            if is_normed:
                root = tl.sqrt(tl.sum(x * x, axis=0) / SIZE + eps)
                factor = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
                partner_factor = tl.load(weight + partner_at, mask=turns, other=0.0).to(tl.float32)
                if IS_GEMMA:
                    x = rounded(x / root * (1.0 + factor), query)
                    partner = rounded(partner / root * (1.0 + partner_factor), query)
                else:
                    x = rounded(rounded(x / root, query) * factor, query)
                    partner = rounded(rounded(partner / root, query) * partner_factor, query)
        c = tl.load(cos + batch * cos_b + token * cos_t + dims, mask=turns, other=0.0).to(tl.float32)
        s = tl.load(sin + batch * sin_b + token * sin_t + dims, mask=turns, other=0.0).to(tl.float32)
        partner = tl.where(dims < ROTARY // 2, -partner, partner)
        x = tl.where(turns, rounded(rounded(x * c, query) + rounded(partner * s, query), query), x)
        if head < heads:
            tl.store(
                query + (place.to(tl.int64) * heads + head) * SIZE + dims, x.to(query.dtype.element_ty), mask=inside
            )
        else:
            group = head - heads
            column = (tl.load(lengths + batch) + token).to(tl.int64)
            base = batch.to(tl.int64) * key_b + group.to(tl.int64) * key_g + column * ROW
            if BITS == 8:
                _write_8(x, at, dims, keys + base, key_halves + base // 2, SIZE)
            elif BITS == 4:
                low = _turned(x, dims, 0, SIZE, HALF, POWER, ROOT)
                high = _turned(x, dims, SIZE // 2, SIZE, HALF, POWER, ROOT)
                _write_4(low, high, tl.arange(0, HALF), keys + base, key_halves + base // 2, SIZE)
            else:
                tl.store(keys + base + dims, x.to(keys.dtype.element_ty), mask=inside)
    else:
        group = head - heads - kv_heads
        column = (tl.load(lengths + batch) + token).to(tl.int64)
        base = batch.to(tl.int64) * value_b + group.to(tl.int64) * value_g + column * ROW_V
        if BITS == 4:
            halves = tl.arange(0, HALF)
            low = tl.load(at + halves, mask=halves < SIZE // 2, other=0.0).to(tl.float32)
            high = tl.load(at + SIZE // 2 + halves, mask=halves < SIZE // 2, other=0.0).to(tl.float32)
            _write_4(low, high, halves, values + base, value_halves + base // 2, SIZE)
        else:
            x = tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)
            if BITS == 8:
                _write_8(x, at, dims, values + base, value_halves + base // 2, SIZE)
            else:
                tl.store(values + base + dims, x.to(values.dtype.element_ty), mask=inside)


@on_its_device
def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    bits: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    style: str = "llama",
) -> Tensor:
    """Return the queries [B, H, T, D], on memory [B, T, H, D]; write keys and values at columns lengths[b] + t.

    qkv [B, T, (H + 2 G) D] contiguous: queries, keys, values; cos, sin [1 or B, T, R], R <= D: the first R values of a
    head turn; keys, values: buffers of a static cache, see `hf_accel.kernels.triton.attention`; lengths int32 [B];
    q_norm, k_norm [D]: weights of RMS norms of each head.
    """
    batch, tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    query = torch.empty(batch, tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    key_halves, value_halves = keys, values
    if bits is not None:
        key_halves, value_halves = keys.view(torch.int16), values.view(torch.int16)
    power = head_dim & -head_dim
    many = [0 if turns.shape[0] == 1 else turns.stride(0) for turns in (cos, sin)]
    _rotary[(batch * tokens, heads + 2 * kv_heads)](
        qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, keys, values, key_halves,
        value_halves, lengths, query, tokens, heads, kv_heads, many[0], cos.stride(1), many[1], sin.stride(1),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), eps,
        SIZE=head_dim, ROTARY=cos.shape[-1], ROW=keys.stride(2), ROW_V=values.stride(2), BITS=bits or 0,
        HAS_Q_NORM=q_norm is not None, HAS_K_NORM=k_norm is not None, IS_GEMMA=style == "gemma", POWER=power,
        ROOT=1.0 / math.sqrt(power), BLOCK=triton.next_power_of_2(head_dim),
        HALF=triton.next_power_of_2(max(1, head_dim // 2)), num_warps=4 if bits == 4 else 1,
        enable_fp_fusion=False,  # else the two products that a turned value adds up are not rounded, as eager ones are
    )  # fmt: skip
    return query.transpose(1, 2)
