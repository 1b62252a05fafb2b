"""How keys and values of a block lie in a buffer or a file, and which of its rows are read."""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np
import torch
from xxhash import xxh3_128_digest

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values of a block


class Run(NamedTuple):
    """Rows that lie one behind the other: `length` rows from `row` on are the stored ones from `source` on."""

    row: int
    source: int
    length: int


def runs_of(rows: tuple[int, ...]) -> list[Run]:
    """Return the longest runs that make row b the stored row rows[b]."""
    runs: list[Run] = []
    for row, source in enumerate(rows):
        if runs and source == runs[-1].source + runs[-1].length:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(Run(row, source, 1))
    return runs


class Layout:
    """How keys [B, G, N, Rk] and values [B, G, N, Rv] lie one behind the other in `size` bytes of a file or buffer.

    What has the larger elements comes first, so that both are aligned. Compared by identity: keep one of each kind.
    """

    def __init__(self, keys: torch.Size, values: torch.Size, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        self._shapes, self._dtypes, self.rows = (keys, values), dtypes, keys[0]
        row_bytes = [shape[1:].numel() * dtype.itemsize for shape, dtype in zip(self._shapes, dtypes)]
        self._order = (1, 0) if dtypes[1].itemsize > dtypes[0].itemsize else (0, 1)
        self.row_bytes = [row_bytes[part] for part in self._order]
        self.size = self.rows * sum(row_bytes)
        self._of_rows: dict[int, Layout] = {}

    def of_rows(self, rows: int) -> Layout:
        """Return the layout of as many rows."""
        if rows == self.rows:
            return self
        if rows not in self._of_rows:
            keys, values = (torch.Size((rows, *shape[1:])) for shape in self._shapes)
            self._of_rows[rows] = Layout(keys, values, self._dtypes)
        return self._of_rows[rows]

    def empty(self, device: torch.device, pin_memory: bool) -> Pair:
        """Return new tensors for keys and values, of `size` bytes together."""
        if device.type == "cpu" and not pin_memory:
            keys, values = (
                pages(shape.numel() * dtype.itemsize).view(dtype).view(shape)
                for shape, dtype in zip(self._shapes, self._dtypes)
            )
        else:
            keys, values = (
                torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)
                for shape, dtype in zip(self._shapes, self._dtypes)
            )
        return keys, values

    def views(self, buffer: torch.Tensor) -> Pair:
        """Return keys and values as views of a uint8 buffer of at least `size` bytes."""
        pair, start = [buffer, buffer], 0
        for part in self._order:
            shape, dtype = self._shapes[part], self._dtypes[part]
            stop = start + shape.numel() * dtype.itemsize
            pair[part], start = buffer[start:stop].view(dtype).view(shape), stop
        return pair[0], pair[1]

    def bytes_of(self, keys: torch.Tensor, values: torch.Tensor) -> list[np.ndarray]:
        """Return the memory of contiguous tensors on the CPU, uint8, in the order in which they lie."""
        return [(keys, values)[part].reshape(-1).view(torch.uint8).numpy() for part in self._order]

    def parts_of(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Return keys and values of a buffer, uint8, in the order in which they lie."""
        first = self.rows * self.row_bytes[0]
        return [buffer[:first], buffer[first : self.size]]

    def digests(self, parts: list[np.ndarray]) -> list[list[bytes]]:
        """Return for each part the digest of each row."""
        return [
            [xxh3_128_digest(part[at : at + size].data) for at in range(0, self.rows * size, size)]
            for part, size in zip(parts, self.row_bytes)
        ]


def pages(size: int) -> torch.Tensor:
    """Return uint8 [size] in CPU memory outside the heap, where blocks among the tensors of a step leave holes."""
    if size < 1 << 16:
        return torch.empty(size, dtype=torch.uint8)
    options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **options), dtype=torch.uint8)
