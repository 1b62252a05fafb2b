"""A file of tensors as the kernels take them, written once and mapped from then on.

It begins with a mark, the digest and the length of a header in JSON, and the header: what the file is of (`about`), and
name -> dtype, shape and place of each tensor. Tensors begin at multiples of 64 bytes, as vectors are loaded; equal
places are one tensor. The mapping is private: tensors may be written to, and the file never is. Cost: nothing is read
until it is used; a header of 8,000 tensors takes 20 ms.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from hf_accel.errors import CheckpointError
from hf_accel.quantization.reading.stream import Stored

MARK = b"hf_accel pack 1\n"
ALIGNMENT, PAGE = 64, 4096
_START = len(MARK) + 16 + 8  # mark, digest, length


class Pack:
    """An open pack: `about` is what was written with it; `names` are those of its tensors.

    is_read: it is read into memory, of large pages where the system grants them, instead of being mapped.

    Raises:
        CheckpointError: there is no such file, or it is damaged or truncated.
    """

    def __init__(self, path: Path, *, is_read: bool = False) -> None:
        try:
            with open(path, "rb") as file:
                start = file.read(_START)
                text = file.read(int.from_bytes(start[-8:], "little")) if len(start) == _START else b""
                size = os.fstat(file.fileno()).st_size
                if not start.startswith(MARK) or xxhash.xxh3_128_digest(text) != start[len(MARK) : -8]:
                    raise CheckpointError(f"{path} is no pack, or its header is damaged. Delete it.")
                header = json.loads(text)
                if size != header["size"]:
                    raise CheckpointError(f"{path} has {size} bytes of {header['size']}. Delete it.")
                if hasattr(os, "posix_fadvise"):  # read ahead, while the model is built
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._storage = (
                Stored(path, "of all bytes", torch.uint8, (size,), 0)[...].untyped_storage()
                if is_read
                else torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
            )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from error
        self.path, self.about = path, header["about"]
        self._entries: dict[str, tuple[str, list[int], int]] = header["tensors"]
        self._made: dict[tuple[str, tuple[int, ...], int], Tensor] = {}

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in the mapping; the same one for names that share it.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.path} lacks the tensor {name}. Delete it.")
        kind, shape, place = self._entries[name]
        key = kind, tuple(shape), place
        if key not in self._made:
            dtype = getattr(torch, kind)
            empty = torch.empty(0, dtype=dtype)
            self._made[key] = empty.set_(self._storage, place // dtype.itemsize, shape)  # type: ignore[call-overload]
        return self._made[key]


def write(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a pack beside its place and move it there when it is complete; what was there before is replaced.

    Raises:
        CheckpointError: it cannot be written.
    """
    parts: dict[tuple[int, str, tuple[int, ...]], tuple[int, Tensor]] = {}
    entries, end = {}, 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        key = tensor.data_ptr() if tensor.numel() else -len(parts) - 1, kind, tuple(tensor.shape)
        if key not in parts:
            parts[key] = end, tensor
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        entries[name] = kind, list(tensor.shape), parts[key][0]
    start, text = _placed(about, entries, end)
    try:
        beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(beside, "xb") as file:
                file.write(MARK + xxhash.xxh3_128_digest(text) + len(text).to_bytes(8, "little") + text)
                for place, tensor in parts.values():
                    _pad(file, start + place)
                    file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
                _pad(file, start + end)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The packed model cannot be kept as {path} ({error}). Free memory there, or load with cache=False."
        ) from error


def _placed(about: Mapping[str, Any], entries: dict[str, tuple[str, list[int], int]], end: int) -> tuple[int, bytes]:
    """Return where tensors begin in the file, and the header that says of each where it lies."""
    start = 0
    while True:
        found = {name: (kind, shape, start + place) for name, (kind, shape, place) in entries.items()}
        text = json.dumps({"about": about, "tensors": found, "size": start + end}).encode()
        needed = -(-(_START + len(text)) // PAGE) * PAGE
        if needed <= start:
            return start, text
        start = needed


def _pad(file: BinaryIO, place: int) -> None:
    file.write(b"\0" * (place - file.tell()))
