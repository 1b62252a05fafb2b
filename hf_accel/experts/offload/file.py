"""One file without a name for the weights of all experts of a model.

Experts are read from it by `preadv` into memory of a fixed size: a read that finds the file truncated or the disk
failing is an error, where a mapping would end the process, and what is read counts only once. The file is mapped, too,
privately: the model's own tensors lie in that mapping, so that copying, saving and the model's own code go on working.
No call of ours computes from the mapping; who is about to read much of it asks `check` first.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_accel.errors import ConfigError, StorageError

PAGE = mmap.PAGESIZE
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Extent(NamedTuple):
    """Bytes of the file, and where they go in the memory of a slot."""

    offset: int
    size: int
    place: int = 0


class ExpertsFile:
    """The file, of a fixed size in bytes. Every method may be called from any thread."""

    def __init__(self, folder: str | None, size: int) -> None:
        """Open it and take its room on the disk.

        Raises:
            ConfigError: no file can be written in the folder.
            StorageError: the disk has no room.
        """
        self.folder, self.size = tempfile.gettempdir() if folder is None else folder, size
        try:
            self._descriptor, path = tempfile.mkstemp(dir=self.folder, prefix="hf_accel-experts-")
            os.unlink(path)
        except (OSError, ValueError) as error:  # ValueError: what can be no path
            raise ConfigError(
                f"no file can be written in the folder {self.folder!r} for experts: {error}. "
                "Name a folder that exists and can be written to."
            ) from error
        # closed when nobody has it any more: a call in another thread may still read when the model is restored
        weakref.finalize(self, os.close, self._descriptor)
        try:
            self._reserve()
        except OSError as error:
            raise self._failed("could not be given its room", error) from error

    def _reserve(self) -> None:
        os.ftruncate(self._descriptor, self.size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, self.size)
            except OSError as error:
                if error.errno not in CANNOT_RESERVE:
                    raise

    def _failed(self, what: str, error: OSError) -> StorageError:
        room = ""
        if error.errno in NO_ROOM:
            free = shutil.disk_usage(self.folder).free
            room = f" The experts take {self.size:,} bytes and {free:,} are free: name another folder."
        return StorageError(f"the file of experts in {self.folder} {what}: {error.strerror}.{room}")

    def write(self, tensor: Tensor, offset: int) -> None:
        """Store the bytes of a contiguous tensor. Raises StorageError if the disk does not take them."""
        left = memory_of(tensor)
        try:
            while left:
                done = os.pwritev(self._descriptor, [left], offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise self._failed("could not be written", error) from error

    def read(self, extents: Sequence[Extent], into: memoryview) -> None:
        """Read extents to their places in a buffer of bytes.

        Raises:
            StorageError: the disk fails, or they are not there any more.
        """
        for offset, size, place in extents:
            left = into[place : place + size]
            try:
                while left:
                    done = os.preadv(self._descriptor, [left], offset)
                    if not done:
                        raise StorageError(
                            f"the file of experts in {self.folder} was truncated: {len(left)} bytes at {offset} are "
                            "missing. Nothing was computed from them. Load the model anew."
                        )
                    left, offset = left[done:], offset + done
            except OSError as error:
                raise self._failed("could not be read", error) from error

    def lost_from(self) -> int | None:
        """Return from which byte on the file is no longer there, None if it is whole."""
        found = os.fstat(self._descriptor).st_size
        return None if found >= self.size else found

    def check(self) -> None:
        """Raise StorageError if the file is no longer whole."""
        if (found := self.lost_from()) is not None:
            raise StorageError(
                f"the file of experts in {self.folder} was truncated to {found:,} of {self.size:,} bytes; their "
                "weights are lost. Load the model anew."
            )

    def mapped(self) -> mmap.mmap:
        """Return the file in memory: changes stay private, and pages are read when they are touched."""
        return mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_COPY)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor; they must not outlive it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_uint8 * size).from_address(tensor.data_ptr())).cast("B")
