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
import mmap
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from xxhash import xxh3_128_digest

from hf_accel.errors import ConfigError, StorageError

Run = tuple[int, int, int]  # rows [0] to [0] + [2] of a result are rows [1] to [1] + [2] of what is stored
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
ALWAYS_CHECKED_BELOW = math.inf  # bytes per second of a read: there is no speed at which one is believed


class Layout:
    """How keys [B, G, N, Rk] and values [B, G, N, Rv] lie one behind the other in a record or buffer of `size` bytes.

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

    def empty(self, device: torch.device, pin_memory: bool) -> tuple[torch.Tensor, torch.Tensor]:
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

    def views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as views of a uint8 buffer of at least `size` bytes."""
        pair, start = [buffer, buffer], 0
        for part in self._order:
            shape, dtype = self._shapes[part], self._dtypes[part]
            stop = start + shape.numel() * dtype.itemsize
            pair[part], start = buffer[start:stop].view(dtype).view(shape), stop
        return pair[0], pair[1]

    def bytes_of(self, keys: torch.Tensor, values: torch.Tensor) -> list[np.ndarray]:
        """Return the memory of contiguous tensors on the CPU, uint8, in the order of a record."""
        return [(keys, values)[part].reshape(-1).view(torch.uint8).numpy() for part in self._order]

    def parts_of(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Return keys and values of a buffer, uint8, in the order of a record."""
        first = self.rows * self.row_bytes[0]
        return [buffer[:first], buffer[first : self.size]]

    def digests(self, parts: list[np.ndarray]) -> list[list[bytes]]:
        """Return for each part the digest of each row."""
        return [
            [xxh3_128_digest(part[at : at + size].data) for at in range(0, self.rows * size, size)]
            for part, size in zip(parts, self.row_bytes)
        ]


class Record:
    """A place in the file that holds one block, and the digests of what was written there."""

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
        self._records = 0
        self._free: dict[int, list[int]] = {}  # by bytes
        self._reserves = hasattr(os, "posix_fallocate")
        self._lock = threading.Lock()  # where reading and writing move a common position

    def write(self, layout: Layout, parts: list[np.ndarray]) -> Record | None:
        """Store the parts of a block; return its record, None if the disk is full.

        Raises StorageError where writing fails otherwise. In no case does anything change for other records.
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
        self._records += 1
        return Record(offset, layout, layout.digests(parts))

    def read(self, record: Record, layout: Layout, runs: list[Run], into: np.ndarray) -> None:
        """Read rows of a record, as `runs` say, into the start of a uint8 buffer, where they have `layout`.

        Raises StorageError if they are not there any more or not what was written.
        """
        if layout is record.layout and len(runs) == 1:
            self._read(into[: layout.size], record.offset)
        else:
            start, stored = 0, record.offset
            for size in layout.row_bytes:
                for row, source, count in runs:
                    place = start + row * size
                    self._read(into[place : place + count * size], stored + source * size)
                start, stored = start + layout.rows * size, stored + record.layout.rows * size
        rows = [source + i for _, source, count in runs for i in range(count)]
        expected = [[digests[row] for row in rows] for digests in record.digests]
        if layout.digests(layout.parts_of(into)) != expected:
            raise StorageError(
                f"the file of cache blocks in {self.folder} was changed: {layout.size} bytes at {record.offset} are "
                "not those that were written. Nothing was computed from them; check the disk and start again."
            )

    def free(self, record: Record) -> None:
        """Give the place of a record to later ones; the last one gives back the disk."""
        self._free.setdefault(record.layout.size, []).append(record.offset)
        self._records -= 1
        if not self._records:
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


def pages(size: int) -> torch.Tensor:
    """Return uint8 [size] in CPU memory outside the heap, where blocks among the tensors of a step leave holes."""
    if size < 1 << 16:
        return torch.empty(size, dtype=torch.uint8)
    options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **options), dtype=torch.uint8)


def runs_of(rows: tuple[int, ...]) -> list[Run]:
    """Return the longest runs of rows that follow one another."""
    runs: list[Run] = []
    for row, source in enumerate(rows):
        if runs and source == runs[-1][1] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((row, source, 1))
    return runs
