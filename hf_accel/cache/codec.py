"""How a cache layer keeps a position: as it is, or as a row of codes (`hf_accel.ops.cached`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.kernels import native
from hf_accel.ops import cached


@dataclass(frozen=True)
class Codec:
    """bits: None (keys and values as they are), 8 or 4."""

    bits: int | None = None

    def row(self, size: int) -> int:
        """Return the elements of a stored row of `size` values."""
        return size if self.bits is None else cached.row_bytes(self.bits, size)

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.bits is None else torch.uint8

    def bytes_per_token(self, kv_heads: int, sizes: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes that keys and values of a token take in one layer."""
        return kv_heads * sum(map(self.row, sizes)) * self.kept_dtype(dtype).itemsize

    def encode(self, states: torch.Tensor, *, is_key: bool) -> torch.Tensor:
        """Return states [B, G, T, D] as they are kept."""
        if self.bits is None:
            return states
        rows = states.new_empty((*states.shape[:3], self.row(states.shape[3])), dtype=torch.uint8)
        self.write(states, rows, is_key=is_key)
        return rows

    def write(self, states: torch.Tensor, rows: torch.Tensor, *, is_key: bool) -> None:
        """Write states [B, G, T, D] to where they are kept, rows [B, G, T, R]."""
        if self.bits is None:
            rows.copy_(states)
        elif (
            states.is_cpu
            and states.dtype in native.DTYPES
            and states.shape[3] <= native.MAX_HEAD_DIM
            and states.stride(3) == 1
            and native.is_available()
        ):
            native.encode(states, self.bits, rows, is_key=is_key)
        else:
            rows.copy_(cached.encode(states, self.bits, is_key=is_key))


AS_IS = Codec()
