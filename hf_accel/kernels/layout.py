"""Codes of 8, 4, 3 and 2 bits as the native kernels read them, and back; `hfa_matrix` in csrc/native.h has the layouts.

Sixteen rows lie interleaved. Codes of fewer than 8 bits are stored plus half their range, so that none is negative.
"""

from __future__ import annotations

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
        low = _joined((above & 3).view(n, k // QUANTUM, 2, 4, 4), 2)
        high = _joined((above >> 2).view(n, k // QUANTUM, 1, 8, 4), 1)
        slabs = torch.cat((low, high), dim=2)  # [N, Kp/32, 3, 4]
        return slabs.view(n // LANES, LANES, k // QUANTUM, 3, 4).permute(0, 2, 3, 1, 4).contiguous()
    joined = _joined(above.view(n, k * bits // 32, 8 // bits, 4), bits)
    return joined.view(n // LANES, LANES, -1, 4).transpose(1, 2).contiguous()


def row_by_row(codes: Tensor, bits: int) -> Tensor:
    """Return interleaved codes as int8 [16 R, Kp]."""
    n = codes.shape[0] * LANES
    if bits == 8:
        return codes.transpose(1, 2).reshape(n, -1)
    if bits == 3:
        slabs = codes.permute(0, 3, 1, 2, 4)  # [R, 16, Kp/32, 3, 4]
        low, high = _parted(slabs[:, :, :, :2], 2), _parted(slabs[:, :, :, 2:], 1)
        above = low.reshape(n, -1) | high.reshape(n, -1) << 2
    else:
        above = _parted(codes.transpose(1, 2), bits).reshape(n, -1)
    return above.view(torch.int8) - (1 << bits - 1)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """Return values uint8 [..., 8 / bits, 4] as bytes [..., 4], the first in the lowest bits."""
    joined = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        joined |= parts[..., i, :] << bits * i
    return joined


def _parted(joined: Tensor, bits: int) -> Tensor:
    """Return the values uint8 [..., 8 / bits, 4] of bytes [..., 4]."""
    return torch.stack([joined >> bits * i & (1 << bits) - 1 for i in range(8 // bits)], dim=-2)
