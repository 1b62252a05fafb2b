"""Gives back the memory of files that are mapped: what was read of them stays in memory as long as they are open.

transformers maps safetensors files and hands over tensors that lie in them. Where one has been rounded, its pages are
of no use any more; the system takes them back at once, and would read them again if somebody asked. Linux only;
elsewhere the system does so when memory is short.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable

from torch import Tensor

_MAPS = "/proc/self/maps"


class MappedFiles:
    """The mappings of some files in this process, looked up when they are first needed."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = {os.path.realpath(path) for path in paths}
        self._ranges: list[tuple[int, int]] | None = None

    def give_back(self, tensor: Tensor) -> None:
        """Give back the whole pages of a tensor that lies in one of the files; of any other tensor nothing."""
        if self._ranges is None:
            self._ranges = self._found()
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        place = bisect_right(self._ranges, (start, end)) - 1
        if place < 0 or not tensor.is_cpu or not tensor.is_contiguous() or end > self._ranges[place][1]:
            return
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

    def _found(self) -> list[tuple[int, int]]:
        found = []
        if os.path.exists(_MAPS):
            with open(_MAPS, encoding="utf-8", errors="surrogateescape") as file:
                for line in file:
                    fields = line.rstrip("\n").split(maxsplit=5)
                    if len(fields) == 6 and fields[5] in self._paths:
                        start, end = fields[0].split("-")
                        found.append((int(start, 16), int(end, 16)))
        return sorted(found)
