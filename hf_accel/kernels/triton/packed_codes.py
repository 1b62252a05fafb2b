"""Codes and scales of packed weights as kernels read them: `hf_accel.kernels.layout` says how they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel.kernels.triton.activation import INTERPRETED

_OF_HALF = tl.constexpr(32768.0)  # what the smallest fp4 value, as fp16, is to its code


@triton.jit
def read_scales(scales, at, mask, FORMAT: tl.constexpr):
    """Return scales, fp32: bits of bf16 (int16), fp16 (uint16) or fp32 (int32), or exponents (uint8)."""
    found = tl.load(scales + at, mask=mask, other=0)
    if FORMAT == 20:
        wide = found.to(tl.int32)
        return tl.where(wide < 2, (wide + 1) << 21, (wide - 1) << 23).to(tl.float32, bitcast=True)
    elif scales.dtype.element_ty == tl.int16:
        return found.to(tl.bfloat16, bitcast=True).to(tl.float32)
    elif scales.dtype.element_ty == tl.uint16:
        return found.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return found.to(tl.float32, bitcast=True)


@triton.jit
def prepared(words, PART: tl.constexpr, FORMAT: tl.constexpr):
    """Return words from which `read_codes` takes the codes that are part PART of each byte."""
    if FORMAT == 8:
        return words.to(tl.int32)
    elif FORMAT == 20:
        return words >> (4 * PART)
    else:  # each code at the top of the seven lower bits of its byte, below a bit that is set
        LEFT: tl.constexpr = 7 - FORMAT - FORMAT * PART
        moved = words << LEFT if LEFT >= 0 else words >> -LEFT
        return (moved & (0x78787878 if FORMAT == 4 else 0x60606060)) | -0x7F7F7F80


@triton.jit
def read_codes(words, top, BYTE: tl.constexpr, FORMAT: tl.constexpr):
    """Return the codes in a byte of prepared words, as fp32; of 4 and 2 bits 1 + stored / 2^bits.

    The bits of such a float are 3f, the prepared byte, 00, 00: one permutation of bytes. top: 0x3f000000, as a value
    that the compiler does not know: it would keep this one in the instruction and fetch the order of bytes each time.
    """
    if FORMAT == 8:  # int16: two signed bytes
        return ((words << (24 - 8 * BYTE)) >> 24).to(tl.float32)
    elif FORMAT == 20:
        return _fp4(words >> (8 * BYTE))
    elif INTERPRETED:
        return ((((words >> (8 * BYTE)) & 255) << 16) | 0x3F000000).to(tl.float32, bitcast=True)
    else:
        ORDER: tl.constexpr = "prmt.b32 $0, $1, $2, 0x7" + ("0", "1", "2", "3")[BYTE] + "44;"
        found = tl.inline_asm_elementwise(ORDER, "=r,r,r", [words, top], dtype=tl.int32, is_pure=True, pack=1)
        return found.to(tl.float32, bitcast=True)


@triton.jit
def _fp4(pattern):
    """Return the codes of patterns: their magnitude is the top of an fp16 value's exponent and fraction."""
    half = ((pattern & 7) << 9) | ((pattern & 8) << 12)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * _OF_HALF


@triton.jit
def code(words, top, BYTE: tl.constexpr, PART: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Return the codes at one place of words in a dtype that holds them exactly."""
    values = read_codes(prepared(words, PART, FORMAT), top, BYTE, FORMAT)
    if FORMAT == 4 or FORMAT == 2:
        values = (values - 1.5) * (1 << FORMAT)
    return values.to(dtype)


@triton.jit
def tile(words, top, FORMAT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of words [BLOCK_J, BLOCK_N] in the order of their columns, [columns, BLOCK_N]."""
    if FORMAT == 8:
        tile = tl.join(code(words, top, 0, 0, 8, dtype), code(words, top, 1, 0, 8, dtype))  # [J, N, 2]
        return tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_J * 2, BLOCK_N))
    elif FORMAT == 2:
        low = tl.join(_four(words, top, 0, 2, dtype), _four(words, top, 1, 2, dtype))
        high = tl.join(_four(words, top, 2, 2, dtype), _four(words, top, 3, 2, dtype))
        return tl.reshape(tl.permute(tl.join(low, high), (0, 5, 4, 3, 2, 1)), (BLOCK_J * 16, BLOCK_N))
    else:
        found = tl.join(_four(words, top, 0, FORMAT, dtype), _four(words, top, 1, FORMAT, dtype))
        return tl.reshape(tl.permute(found, (0, 4, 3, 2, 1)), (BLOCK_J * 8, BLOCK_N))


@triton.jit
def _four(words, top, PART: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of the four bytes of words, [J, N, 2 (low bit of the byte's number), 2 (high bit)]."""
    even = tl.join(code(words, top, 0, PART, FORMAT, dtype), code(words, top, 1, PART, FORMAT, dtype))
    odd = tl.join(code(words, top, 2, PART, FORMAT, dtype), code(words, top, 3, PART, FORMAT, dtype))
    return tl.join(even, odd)
