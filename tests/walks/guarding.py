"""Tensors whose memory ends exactly at a page that cannot be read, or begins right behind one."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import block

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PRIVATE_ANONYMOUS = 0x22


class Pages:
    """Guarded memory of one case; `clear` gives all of it back.

    at_front: a tensor begins behind the first guard, instead of ending before the second. are_guarded: False for
    ordinary memory, which a sanitizer watches.
    """

    def __init__(self, at_front: bool = False, are_guarded: bool = True) -> None:
        self.at_front, self.are_guarded = at_front, are_guarded
        self._maps: list[tuple[int, int]] = []

    def _memory(self, count: int) -> int:
        """Return the address of `count` bytes between two pages that may not be touched."""
        size = -(-count // PAGE) * PAGE
        start = _LIBC.mmap(None, size + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"no {size} bytes of guarded memory")
        for guard in (start, start + PAGE + size):
            if _LIBC.mprotect(guard, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._maps.append((start, size + 2 * PAGE))
        return int(start + PAGE + (0 if self.at_front else size - count))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        if not count or not self.are_guarded:
            return torch.empty(shape, dtype=dtype)
        memory = (ctypes.c_uint8 * count).from_address(self._memory(count))
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)

    def put(self, tensor: Tensor | None, gap: int = 0) -> Any:
        """Return a copy of `tensor` in guarded memory, `gap` elements between its rows and none behind the last."""
        if tensor is None:
            return None
        if not gap or tensor.dim() < 2:
            return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
        *lead, width = tensor.shape
        strides, step = [1], width + gap
        for size in reversed(lead):
            strides.insert(0, step)
            step *= size
        flat = self.empty((sum(s * (n - 1) for s, n in zip(strides, tensor.shape)) + 1,), tensor.dtype).zero_()
        return flat.as_strided(tuple(tensor.shape), strides).copy_(tensor)

    def clear(self) -> None:
        for start, size in self._maps:
            _LIBC.munmap(start, size)
        self._maps.clear()


@contextmanager
def outputs_in(pages: Pages) -> Iterator[None]:
    """Let native calls write into guarded memory: they allocate with `new_empty` and `empty_like`."""

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return pages.empty(tuple(size[0] if isinstance(size[0], (tuple, list)) else size), dtype or self.dtype)

    before = block._empty_like
    torch.Tensor.new_empty = new_empty  # type: ignore[assignment, method-assign]
    block._empty_like = lambda like: pages.empty(tuple(like.shape), like.dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.new_empty
        block._empty_like = before
