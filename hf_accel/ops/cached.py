"""Keys and values in few bits, a row of bytes per token and head: append-only, with the scales inside the row.

8 bits: round to nearest, symmetric, one scale. 4 bits: a scale and a minimum; keys are turned by a Hadamard matrix
first (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4), which spreads the few large channels that keys have
(KIVI, Liu et al. 2024, arXiv:2402.02750, section 3) over all of them. Scores do not change when queries turn, too.
KIVI's scales per channel over blocks leave the last tokens unrounded until their block is full: a step taken back or a
prefix reused would then give other text. Cost: D + 2 or D/2 + 4 bytes of a row, against 2 D in 16 bits.
"""

from __future__ import annotations

import math

import torch

BITS = (8, 4)


def row_bytes(bits: int, size: int) -> int:
    """Return the bytes of a row of `size` values (even for 4 bits)."""
    return size + 2 if bits == 8 else size // 2 + 4


def rotate(states: torch.Tensor) -> torch.Tensor:
    """Return states [..., D], fp32, times an orthonormal Hadamard matrix, which is its own inverse.

    In blocks of the largest power of two that divides D.
    """
    size = states.shape[-1]
    block = size & -size
    half = 1
    while half < block:
        pairs = states.unflatten(-1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        states = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return states * (1.0 / math.sqrt(block))


def encode(states: torch.Tensor, bits: int, *, is_key: bool) -> torch.Tensor:
    """Return states [..., D] as rows of codes, uint8 [..., `row_bytes`]. A row that is not finite reads as NaN."""
    values = states.float()
    if bits == 8:
        scale = _up(_amax(values) / 127.0)
        codes = _codes(values * _inverse(scale), -127, 127).to(torch.int8).view(torch.uint8)
        return torch.cat([codes, _bytes(scale)], dim=-1)
    strange = _amax(values) * 0.0
    if is_key:
        values = rotate(values)
    low = _down(values.amin(-1, keepdim=True) + strange)
    scale = _up((values.amax(-1, keepdim=True) - low) / 15.0 + strange)
    codes = _codes((values - low) * _inverse(scale), 0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    return torch.cat([first | second << 4, _bytes(scale), _bytes(low)], dim=-1)


def decode(rows: torch.Tensor, bits: int, size: int, dtype: torch.dtype, *, is_key: bool) -> torch.Tensor:
    """Return the states [..., D] that rows of codes stand for."""
    if bits == 8:
        scale = _floats(rows[..., size:])
        return (rows[..., :size].view(torch.int8).float() * scale).to(dtype)
    half = size // 2
    ends = _floats(rows[..., half:])
    codes = torch.cat([rows[..., :half] & 15, rows[..., :half] >> 4], dim=-1).float()
    values = codes * ends[..., :1] + ends[..., 1:]
    return (rotate(values) if is_key else values).to(dtype)


def _amax(values: torch.Tensor) -> torch.Tensor:
    most = values.abs().amax(-1, keepdim=True)
    return most.masked_fill_(~torch.isfinite(most), torch.nan)


def _codes(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return values.nan_to_num(0.0).round().clamp(low, high)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    inverse = 1.0 / scale
    return torch.where((scale > 0) & (inverse <= 3.0e38), inverse, torch.zeros_like(scale))


def _up(values: torch.Tensor) -> torch.Tensor:
    """Round to bf16 away from zero, so that nothing lies outside the scale."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + (values > 0).int() * 0xFFFF) & -0x10000).view(torch.float32)


def _down(values: torch.Tensor) -> torch.Tensor:
    bits = values.contiguous().view(torch.int32)
    return ((bits + (values < 0).int() * 0xFFFF) & -0x10000).view(torch.float32)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).view(torch.uint8)


def _floats(rows: torch.Tensor) -> torch.Tensor:
    # a copy: two bytes can only be viewed as one number at even addresses
    return rows.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
