"""Memory in large pages (2 MiB on most machines): one entry of the processor's address tables reaches 512 times as far.

Tensors stay torch's own and where they are: the system is asked to put large pages beneath them. New memory is advised
before it is written to. Memory in use is collapsed, in place, by Linux from 6.1 on: values and addresses stay, so that
nothing is to be undone. Pages that a tensor has only a part of are asked for, too: its neighbours lie in them. Nothing
here fails: where the system refuses, memory is as it was, and `obstacle` says why.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT, STATUS, MAPS = (
    Path("/sys/kernel/mm/transparent_hugepage"),
    Path("/proc/self/status"),
    Path("/proc/self/smaps"),
)
_NORMAL = 2 << 20  # bytes of a large page where the system does not say
_HUGE, _NO_HUGE, _COLLAPSE = 14, 15, 25  # <linux/mman.h>; Python's mmap does not have all of them
_PATIENCE = 4  # refusals in succession after which a tensor is left alone: each may have searched all of memory
_FIELDS = ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:")


@functools.cache
def page_bytes() -> int:
    """Return the bytes of a large page."""
    try:
        return int((ROOT / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return _NORMAL


@functools.cache
def obstacle() -> str | None:
    """Return why this process gets no large pages, in a sentence for the user; None where it may get some."""
    if not sys.platform.startswith("linux"):
        return f"large pages are asked for on Linux only, and this is {sys.platform}."
    try:
        enabled = (ROOT / "enabled").read_text()
    except OSError as error:
        return f"this kernel has no transparent large pages ({error.strerror or error})."
    if "[never]" in enabled:
        return f"the system grants none: {ROOT / 'enabled'} is never; an administrator can write madvise to it."
    if STATUS.exists() and "THP_enabled:\t0" in STATUS.read_text():
        return "they are disabled for this process (prctl PR_SET_THP_DISABLE)."
    return None


def advise(tensor: Tensor, *, large: bool = True) -> Tensor:
    """Ask for large pages (or, `large` false, for small ones) beneath memory before it is written to; return it.

    Cost: some microseconds; a large page is filled with zeros as a whole when the first byte of it is written.
    """
    if _is_served(tensor):
        start, stop = _range(tensor)
        page = page_bytes()
        advice = _HUGE if large else _NO_HUGE
        if not _madvise(start // page * page, -(-stop // page) * page, advice):  # some of it is not mapped
            _madvise(-(-start // page) * page, stop // page * page, advice)
    return tensor


def collapse(tensor: Tensor) -> int:
    """Put large pages beneath memory in use, and return how many bytes of it lie in such pages now.

    Cost: the system copies what does not lie in large pages yet, one page at a time.
    """
    if not _is_served(tensor):
        return 0
    (start, stop), page, found, refused = _range(tensor), page_bytes(), 0, 0
    first, last = -(-start // page) * page, stop // page * page
    places = [*range(start // page * page, first, page), *range(last, stop, page)]
    if _madvise(first, last, _COLLAPSE):  # in one call, which takes far less than one for each page
        found = last - first
    else:
        places += range(first, last, page)
    for place in places:
        if _madvise(place, place + page, _COLLAPSE):
            found, refused = found + min(place + page, stop) - max(place, start), 0
        elif (refused := refused + 1) == _PATIENCE:
            break
    return found


def settle(*tensors: Tensor | None) -> None:
    """Collapse each tensor that is there and large enough; memory that maps a file is refused by the system."""
    for tensor in tensors:
        if tensor is not None:
            collapse(tensor)


def copied(tensor: Tensor) -> Tensor:
    """Return a copy, contiguous as the original is, in new memory of large pages."""
    copy = advise(torch.empty_like(tensor)).copy_(tensor)
    collapse(copy)  # what the allocator has given out before
    return copy


def is_large(tensor: Tensor) -> bool:
    """Return whether a tensor fills at least one large page of the CPU's memory."""
    return type(tensor.data) is Tensor and tensor.is_cpu and tensor.numel() * tensor.element_size() >= page_bytes()


def large_bytes() -> int:
    """Return how many bytes of this process's memory lie in large pages; cost: milliseconds per GB."""
    try:
        lines = [line.split() for line in MAPS.read_text().splitlines()]
    except OSError:
        return 0
    return sum(1024 * int(fields[1]) for fields in lines if fields[0] in _FIELDS)


def _is_served(tensor: Tensor) -> bool:
    return is_large(tensor) and obstacle() is None and tensor.data_ptr() != 0


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return where the memory between a tensor's first and last element begins and ends."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _madvise(start: int, stop: int, advice: int) -> bool:
    if stop <= start:
        return True
    return _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(advice)) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
