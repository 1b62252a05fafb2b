"""What a decoder layer reads, for all rows of a text: in memory, or in a file, if it is large or is to outlast a run.

A file is mapped into memory: the system keeps what fits. Cost: the bytes of the rows, once for what a layer reads and
once for what it gives.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_accel.errors import StorageError


class Activations:
    """Rows [N, T, E] of activations; `values` is one tensor, in memory or on a file.

    Raises:
        StorageError: the file cannot be made as large as needed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, file: Path | None) -> None:
        self.device, self.file = device, file
        if file is None:
            self.values = torch.empty(shape, dtype=dtype, device=device)
            return
        size = math.prod(shape)
        try:
            with file.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, size * dtype.itemsize)  # no room is said now, not by a signal
        except OSError as error:
            raise StorageError(
                f"{file} cannot hold {size * dtype.itemsize:,} bytes of activations ({error.strerror}). Free room "
                "there, name another folder, or give less text."
            ) from error
        self.values = _mapped(file, shape, dtype)

    @classmethod
    def opened(cls, file: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Activations:
        """Return the rows that a file holds.

        Raises:
            StorageError: it is not of this size.
        """
        found = cls.__new__(cls)
        if file.stat().st_size != math.prod(shape) * dtype.itemsize:
            raise StorageError(f"{file} is damaged: it has not the size of {shape} activations. Delete its folder.")
        found.device, found.file, found.values = device, file, _mapped(file, shape, dtype)
        return found

    def __len__(self) -> int:
        return len(self.values)

    def row(self, index: int) -> Tensor:
        """Return one row [1, T, E] on the device of the model."""
        return self.values[index : index + 1].to(self.device)

    def write(self, index: int, row: Tensor) -> None:
        """Put one row [1, T, E] in its place."""
        self.values[index : index + 1].copy_(row)

    def delete(self) -> None:
        """Give up the memory, and the file if there is one."""
        del self.values
        if self.file is not None:
            self.file.unlink(missing_ok=True)


class Room:
    """Where activations lie: in memory up to `max_bytes`, else in files of `folder`, or of a temporary one."""

    def __init__(self, max_bytes: int, folder: Path | None) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.spilled_bytes = 0

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *error: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Activations:
        """Return room for rows of this shape."""
        needed = math.prod(shape) * dtype.itemsize
        if self.folder is not None:
            return Activations(shape, dtype, device, self.folder / name)
        if needed <= self.max_bytes:
            return Activations(shape, dtype, device, None)
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="hf-accel-")
        self.spilled_bytes = max(self.spilled_bytes, needed)
        return Activations(shape, dtype, device, Path(self._temporary.name) / name)


class Stream:
    """What one layer after the other reads of a text, each from what the one before it gives.

    read: what layer `index` reads; name: of the files, with a place for the index.
    """

    def __init__(self, room: Room, name: str, index: int, rows: int, first: Callable[[int], Tensor]) -> None:
        """Begin at layer 0 with the rows that `first` returns for each index, or at a later one with what was left.

        Raises:
            StorageError: there is no room, or what was left is damaged.
        """
        self.room, self.name, self.index = room, name, index
        row = first(0)
        shape = (rows, *row.shape[1:])
        if index and room.folder is not None:
            self.read = Activations.opened(room.folder / name.format(index), shape, row.dtype, row.device)
            return
        self.read = room.make(name.format(0), shape, row.dtype, row.device)
        for place in range(rows):
            self.read.write(place, first(place))

    def room_for_next(self) -> Activations:
        """Return room for what the next layer reads."""
        values = self.read.values
        return self.room.make(self.name.format(self.index + 1), tuple(values.shape), values.dtype, self.read.device)

    def go_on(self, read: Activations) -> None:
        """Go on to the next layer, which reads `read`; what this one read is deleted."""
        self.read.delete()
        self.read, self.index = read, self.index + 1


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
