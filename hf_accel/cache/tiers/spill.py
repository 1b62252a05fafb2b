"""One anonymous file for the cache blocks that do not fit in memory, read and written at explicit positions.

The file is not mapped: a mapping that is truncated, or on a disk that fails, kills the process with SIGBUS, and its
pages count as resident memory. It has no name, so nothing is left of it however the process ends.
Every read is checked against digests that stay in memory, one per row of keys and of values, so a changed bit, words,
pages or blocks in each other's place and what lay there before are an error and never text.
Cost: one system call per block or run of its rows (150 µs per MB from the page cache, else what the disk gives), and
20 to 70 µs per MB for the digests, 130 in blocks that fit no cache; both without the lock of the interpreter.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import threading
from pathlib import Path

import numpy as np

from hf_accel.cache.tiers.layout import Layout, Run
from hf_accel.errors import ConfigError, StorageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
ALWAYS_CHECKED_BELOW = math.inf  # bytes per second of a read: at no speed is one believed without its digest


class Extent:
    """A stretch of the file that holds one block, and the digests of what was written there."""

    __slots__ = ("digests", "layout", "offset")

    def __init__(self, offset: int, layout: Layout, digests: list[list[bytes]]) -> None:
        self.offset, self.layout, self.digests = offset, layout, digests


class Spill:
    """The file. `size` is its bytes on the disk, `full` why a block did not fit."""

    def __init__(self, folder: Path | str | None) -> None:
        """Open it in `folder`, None: the system's for temporary files. Raises ConfigError if that is impossible."""
        try:
            self.folder = str(folder if folder is not None else tempfile.gettempdir())
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:  # ValueError: what can be no path
            raise ConfigError(
                f"no file can be written in the folder {str(folder)!r} for cache blocks: {error}. "
                "Name a folder that exists and can be written to."
            ) from error
        self.size = 0
        self.full = ""
        self._extents = 0
        self._free: dict[int, list[int]] = {}  # by bytes
        self._reserves = hasattr(os, "posix_fallocate")
        self._lock = threading.Lock()  # where reading and writing move a common position

    def write(self, layout: Layout, parts: list[np.ndarray]) -> Extent | None:
        """Store the parts of a block; return its extent, None if the disk is full.

        Raises StorageError where writing fails otherwise. In no case does anything change for other extents.
        """
        free = self._free.get(layout.size)
        offset = free[-1] if free else self.size
        try:
            if not free:
                self._reserve(offset, layout.size)
            at = offset
            for part in parts:
                self._write(part, at)
                at += len(part)
        except OSError as error:
            self._shrink(self.size)
            if error.errno not in NO_ROOM:
                raise StorageError(f"a cache block could not be written to a file in {self.folder}: {error}") from error
            self.full = f"the disk of {self.folder} is full ({error.strerror})"
            return None
        if free:
            free.pop()
        else:
            self.size += layout.size
        self._extents += 1
        return Extent(offset, layout, layout.digests(parts))

    def read(self, extent: Extent, layout: Layout, runs: list[Run], into: np.ndarray) -> None:
        """Read rows of an extent, as `runs` say, into the start of a uint8 buffer, where they have `layout`.

        Raises StorageError if they are not there any more or not what was written.
        """
        if layout is extent.layout and len(runs) == 1:
            self._read(into[: layout.size], extent.offset)
        else:
            start, stored = 0, extent.offset
            for size in layout.row_bytes:
                for row, source, count in runs:
                    place = start + row * size
                    self._read(into[place : place + count * size], stored + source * size)
                start, stored = start + layout.rows * size, stored + extent.layout.rows * size
        rows = [source + i for _, source, count in runs for i in range(count)]
        expected = [[digests[row] for row in rows] for digests in extent.digests]
        if layout.digests(layout.parts_of(into)) != expected:
            raise StorageError(
                f"the file of cache blocks in {self.folder} was changed: {layout.size} bytes at {extent.offset} are "
                "not those that were written. Nothing was computed from them; check the disk and start again."
            )

    def free(self, extent: Extent) -> None:
        """Give the place of an extent to later ones; the last one gives back the disk."""
        self._free.setdefault(extent.layout.size, []).append(extent.offset)
        self._extents -= 1
        if not self._extents:
            self._free.clear()
            self.size = 0
            self._shrink(0)

    def close(self) -> None:
        """Close the file, which frees its room on the disk."""
        self._file.close()
        self.size = 0

    def _reserve(self, offset: int, size: int) -> None:
        if not self._reserves:
            return
        try:
            os.posix_fallocate(self._file.fileno(), offset, size)
        except OSError as error:
            if error.errno not in CANNOT_RESERVE:
                raise
            self._reserves = False  # the write itself finds a full disk

    def _shrink(self, size: int) -> None:
        try:
            self._file.truncate(size)
        except OSError as error:
            self.full = f"{self.folder} does not take back room: {error}"

    def _write(self, part: np.ndarray, at: int) -> None:
        while len(part):
            if hasattr(os, "pwritev"):
                done = os.pwritev(self._file.fileno(), [part.data], at)
            else:
                with self._lock:
                    self._file.seek(at)
                    done = self._file.write(part.data)
            part, at = part[done:], at + done

    def _read(self, into: np.ndarray, at: int) -> None:
        try:
            while len(into):
                if hasattr(os, "preadv"):
                    done = os.preadv(self._file.fileno(), [into.data], at)
                else:
                    with self._lock:
                        self._file.seek(at)
                        done = self._file.readinto(into.data)  # type: ignore[attr-defined]
                if not done:
                    raise StorageError(
                        f"the file of cache blocks in {self.folder} was truncated: {len(into)} bytes at {at} are "
                        "missing. Nothing was computed from them; start again."
                    )
                into, at = into[done:], at + done
        except OSError as error:
            raise StorageError(f"cache blocks could not be read from a file in {self.folder}: {error}") from error
