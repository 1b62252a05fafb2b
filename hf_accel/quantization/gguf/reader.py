"""Reading a GGUF file: metadata, and the bytes of each tensor where they lie in the mapped file.

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. Every length is checked against the file
before it is used, so that a file cut short is an error and never a tensor of other bytes. Cost: the metadata; tensors
are mapped.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import CheckpointError
from hf_accel.quantization.gguf.package import gguf_package

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MANY = 64  # strings of an array that are read together: vocabularies


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its shape, the last axis that of blocks; its type by ggml's name; where its bytes begin."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    nbytes: int


@dataclass
class Header:
    """What a file says: `metadata` by key, `tensors` by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]

    def __getitem__(self, key: str) -> Any:
        """Return a value of the metadata.

        Raises:
            CheckpointError: there is none of this key.
        """
        if key not in self.metadata:
            raise self.damaged(f"its metadata lack {key}")
        return self.metadata[key]

    @property
    def architecture(self) -> str:
        return str(self["general.architecture"])

    def blocks(self, entry: Entry) -> Tensor:
        """Return the bytes of a tensor, uint8 [..., bytes of a row].

        Raises:
            CheckpointError: this is the header alone.
        """
        raise self.damaged(f"the bytes of {entry.name} are not here")

    def damaged(self, fault: str) -> CheckpointError:
        """Return the error that says what is wrong with the file."""
        return CheckpointError(f"{self.path}: {fault}. Download or write the file anew.")


class GgufFile(Header):
    """A mapped GGUF file.

    Raises:
        CheckpointError: it cannot be read, is no GGUF file, of another version or byte order, cut short or one of
            several parts, or has a tensor of a type that is not known.
        MissingDependencyError: the gguf package is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(Path(path), {}, {})
        self._types = {int(kind): (kind.name, *sizes) for kind, sizes in gguf_package().GGML_QUANT_SIZES.items()}
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{self.path} cannot be read ({error}).") from error
        self._at = 0
        if self._bytes[:4] != b"GGUF":
            raise self.damaged("it does not begin with GGUF; it is a file of another format")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise self.damaged(f"it is of version {version} or of another byte order; little-endian 2 and 3 are read")
        count, pairs = self._number("Q"), self._number("Q")
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise self.damaged(
                f"it is one of {self.metadata['split.count']} parts; join them by llama-gguf-split --merge"
            )
        table: list[tuple[str, tuple[int, ...], int, int]] = [self._described() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self.damaged(f"its alignment is {alignment!r}")
        first = -(-self._at // alignment) * alignment
        self.tensors = {name: self._entry(name, shape, kind, at, first) for name, shape, kind, at in table}
        if len(self.tensors) != len(table):
            raise self.damaged("two of its tensors have one name")

    def blocks(self, entry: Entry) -> Tensor:
        """Return the bytes of a tensor, uint8 [..., bytes of a row], in the mapped file."""
        found = torch.frombuffer(self._bytes, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        return found.view(*entry.shape[:-1], -1)

    def release(self, entry: Entry) -> None:
        """Let the system take back the memory in which a tensor of the file was read; it can be read again."""
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED, start, entry.start + entry.nbytes - start)

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.damaged(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int, first: int) -> Entry:
        if kind not in self._types:
            raise self.damaged(f"the tensor {name} is of type {kind}, which the installed gguf package does not know")
        type_name, columns, nbytes = self._types[kind]
        if shape[-1] % columns:
            raise self.damaged(
                f"the tensor {name} has rows of {shape[-1]} columns, no multiple of the {columns} of {type_name}"
            )
        size = prod(shape) // columns * nbytes
        if first + offset + size > len(self._bytes):
            raise self.damaged(
                f"it is cut short: the tensor {name} ends at byte {first + offset + size}, the file at "
                f"{len(self._bytes)}"
            )
        return Entry(name, shape, type_name, first + offset, size)

    def _number(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{kind}", self._take(size))[0]

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._bytes):
            raise self.damaged(
                f"it is cut short: its metadata go on behind byte {len(self._bytes)}, where the file ends"
            )
        self._at += size
        return self._bytes[self._at - size : self._at]

    def _string(self) -> str:
        found = self._take(self._number("Q"))
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"its metadata hold text that is no UTF-8 ({error})") from error

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self.damaged(f"its metadata hold a value of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            size = struct.calcsize(f"<{_NUMBERS[inner]}")
            return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self._take(count * size)))
        if inner == _STRING and count > _MANY:
            return self._strings(count)
        return [self._value(inner) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """Return as many strings as follow, as `_string` would, in a tenth of the time."""
        content, at, found, length_of = self._bytes, self._at, [], struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = length_of(content, at)
                at += 8 + length
                found.append(content[at - length : at].decode("utf-8"))
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise self.damaged(f"it is cut short or damaged: one of its {count} strings cannot be read") from error
        self._at = at
        self._take(0)
        return found
