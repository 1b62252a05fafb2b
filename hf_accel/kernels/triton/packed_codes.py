"""Codes and scales of packed weights as kernels read them: `hf_accel.kernels.layout` says how they lie."""

from __future__ import annotations

import triton
import triton.language as tl

_OF_HALF = tl.constexpr(32768.0)  # what the smallest fp4 value, as fp16, is to its code


@triton.jit
def read_scales(scales, at, mask, FORMAT: tl.constexpr):
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
def read_codes(words, shift, FORMAT: tl.constexpr):
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
def _fp4(pattern):
    """Return the codes of patterns: their magnitude is the top of an fp16 value's exponent and fraction."""
    half = ((pattern & 7) << 9) | ((pattern & 8) << 12)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * _OF_HALF


@triton.jit
def code(words, SHIFT: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Return the codes at one place of words in a dtype that holds them exactly."""
    values = read_codes(words, SHIFT, FORMAT)
    if FORMAT == 4 or FORMAT == 2:
        values = (values - 1.5) * (1 << FORMAT)
    return values.to(dtype)


@triton.jit
def tile(words, FORMAT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Return the codes of words [BLOCK_J, BLOCK_N] in the order of their columns, [columns, BLOCK_N]."""
    if FORMAT == 8:
        tile = tl.join(code(words, 0, 8, dtype), code(words, 8, 8, dtype))  # [J, N, 2]
        return tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_J * 2, BLOCK_N))
    elif FORMAT == 2:
        low = tl.join(_four(words, 0, 2, dtype), _four(words, 2, 2, dtype))
        high = tl.join(_four(words, 4, 2, dtype), _four(words, 6, 2, dtype))
        return tl.reshape(tl.permute(tl.join(low, high), (0, 5, 4, 3, 2, 1)), (BLOCK_J * 16, BLOCK_N))
    else:
        tile = tl.join(_four(words, 0, FORMAT, dtype), _four(words, 4, FORMAT, dtype))
        return tl.reshape(tl.permute(tile, (0, 4, 3, 2, 1)), (BLOCK_J * 8, BLOCK_N))


@triton.jit
def _four(words, SHIFT: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of the four bytes of words, [J, N, 2 (low bit of the byte's number), 2 (high bit)]."""
    even = tl.join(code(words, SHIFT, FORMAT, dtype), code(words, SHIFT + 8, FORMAT, dtype))
    odd = tl.join(code(words, SHIFT + 16, FORMAT, dtype), code(words, SHIFT + 24, FORMAT, dtype))
    return tl.join(even, odd)
