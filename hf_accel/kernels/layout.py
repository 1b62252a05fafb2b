"""Codes of 8, 4, 3 and 2 bits as the native kernels read them, and back; `hfa_matrix` in csrc/native.h has the layouts.

Sixteen rows lie interleaved. Codes of fewer than 8 bits are stored plus half their range, so that none is negative. Fp4
values lie as codes of 4 bits do.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

LANES = 16
"""Rows that lie interleaved."""
QUANTUM = 32
"""Columns come in multiples of this."""


def codes_shape(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """Return the shape of the interleaved codes of a weight [rows, columns]."""
    parts, padded = -(-rows // LANES), -(-columns // QUANTUM) * QUANTUM
    if bits == 3:
        return parts, padded // QUANTUM, 3, LANES, 4
    each = 2 if bits == 8 else 4
    return parts, padded * bits // (8 * each), LANES, each


def interleaved(codes: Tensor, bits: int) -> Tensor:
    """Return int8 codes [N, K] interleaved; N a multiple of 16, K of 32."""
    n, k = codes.shape
    if bits == 8:
        return codes.view(n // LANES, LANES, k // 2, 2).transpose(1, 2).contiguous()
    above = (codes + (1 << bits - 1)).view(torch.uint8)
    if bits == 3:
        fours = above.view(n, k // QUANTUM, 8, 4)
        whole, split = fours[:, :, :6].unflatten(2, (3, 2)), fours[:, :, 6:]
        parts = whole[:, :, :, 0] | whole[:, :, :, 1] << 3  # [N, Kp/32, 3, 4]
        parts[:, :, :2] |= split >> 1 << 6
        parts[:, :, 2] |= (split[:, :, 0] & 1) << 6 | (split[:, :, 1] & 1) << 7
        return parts.view(n // LANES, LANES, k // QUANTUM, 3, 4).permute(0, 2, 3, 1, 4).contiguous()
    joined = _joined(above.view(n, k * bits // 32, 8 // bits, 4), bits)
    return joined.view(n // LANES, LANES, -1, 4).transpose(1, 2).contiguous()


def row_by_row(codes: Tensor, bits: int) -> Tensor:
    """Return interleaved codes as int8 [16 R, Kp]."""
    n = codes.shape[0] * LANES
    if bits == 8:
        return codes.transpose(1, 2).reshape(n, -1)
    if bits == 3:
        parts = codes.permute(0, 3, 1, 2, 4)  # [R, 16, Kp/32, 3, 4]
        whole = torch.stack((parts & 7, parts >> 3 & 7), dim=4).flatten(3, 4)
        lowest = parts[..., 2, :] >> 6
        split = parts[..., :2, :] >> 5 & 6 | torch.stack((lowest & 1, lowest >> 1), dim=3)
        above = torch.cat((whole, split), dim=3).reshape(n, -1)
    else:
        above = _parted(codes.transpose(1, 2), bits).reshape(n, -1)
    return above.view(torch.int8) - (1 << bits - 1)


def gathered(codes: Tensor, block: Tensor, lane: Tensor, bits: int) -> Tensor:
    """Return the rows 16 * block + lane of interleaved codes of 8 or 4 bits as int8 [..., Kp]."""
    found = codes[block, :, lane]  # [..., parts, 2 or 4]
    if bits == 8:
        return found.flatten(-2)
    return _parted(found, bits).flatten(-3).view(torch.int8) - (1 << bits - 1)


def from_mxfp4(blocks: Tensor) -> Tensor:
    """Return fp4 values interleaved, which files hold as uint8 [N, K / 2], the first of two in the low half of a byte.

    N a multiple of 16, K of 32.
    """
    parts, places = len(blocks) // LANES, blocks.shape[1] // 4
    words = _exchanged(_exchanged(_words(blocks.contiguous()), 8, 0x0000FF00), 4, 0x00F000F0)
    laid_out = words.view(parts, LANES, places).transpose(1, 2).contiguous()
    return _words(laid_out.view(torch.uint8)).view(torch.uint8).view(parts, places, LANES, 4)


def to_mxfp4(codes: Tensor) -> Tensor:
    """Return interleaved fp4 values as files hold them, uint8 [16 R, K / 2]."""
    rows = codes.transpose(1, 2).reshape(codes.shape[0] * LANES, -1)
    words = _exchanged(_exchanged(_words(rows), 4, 0x00F000F0), 8, 0x0000FF00)
    return _words(words.view(torch.uint8)).view(torch.uint8)


def _exchanged(words: Tensor, distance: int, mask: int) -> Tensor:
    """Return int32 words with the bits of `mask` and those `distance` above them exchanged."""
    difference = (words >> distance).bitwise_xor_(words).bitwise_and_(mask)
    exchanged = words ^ difference
    return exchanged.bitwise_xor_(difference.bitwise_left_shift_(distance))


def _words(rows: Tensor) -> Tensor:
    """Return bytes [..., 4 n] as little-endian int32 [..., n]."""
    if sys.byteorder == "big":
        rows = rows.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return rows.view(torch.int32)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """Return values uint8 [..., 8 / bits, 4] as bytes [..., 4], the first in the lowest bits."""
    joined = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        joined |= parts[..., i, :] << bits * i
    return joined


def _parted(joined: Tensor, bits: int) -> Tensor:
    """Return the values uint8 [..., 8 / bits, 4] of bytes [..., 4]."""
    return torch.stack([joined >> bits * i & (1 << bits) - 1 for i in range(8 // bits)], dim=-2)
