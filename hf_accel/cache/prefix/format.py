"""The file of a block: safetensors, with a BLAKE2b checksum of every other byte in its metadata.

Nothing of it is believed before the checksum was compared, but for how long the file should be: what has another
length is not read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hf_accel.errors import CheckpointError

FORMAT = "1"
LARGEST_HEAD = 1 << 20  # bytes

_FIELD = b'"checksum":"'
_BLANK = "0" * 64


class BlockFile(NamedTuple):
    """What a file holds; `owner` and `tokens` are opaque digests for the caller to compare."""

    owner: str
    tokens: str
    tensors: tuple[torch.Tensor, ...]


def read_block(file: BinaryIO, key: bytes, largest: int) -> BlockFile:
    """Return what an open file of at most `largest` bytes holds.

    Raises:
        CheckpointError: it is truncated, extended, altered, of another format, or another block's.
    """
    size = os.fstat(file.fileno()).st_size
    if size > largest or size != _head(file)[1]:
        raise CheckpointError("it does not have the length that its head says, or is larger than the budget")
    file.seek(0)
    return decode(file.read(size), key)


def read_owner(file: BinaryIO) -> str | None:
    """Return the owner that the head of a file names, None if it names none; damage may have made it another's."""
    try:
        owner = _head(file)[0]["owner"]
    except (CheckpointError, KeyError, TypeError):
        return None
    return owner if isinstance(owner, str) else None


def _head(file: BinaryIO) -> tuple[Any, int]:
    """Return the metadata that a file says it has, and of how many bytes it says it is."""
    size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEAD:
        raise CheckpointError("its head is too large")
    try:
        entries = json.loads(file.read(size))
        metadata = entries.pop("__metadata__")
        return metadata, 8 + size + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its head is not what was written ({error})") from error


def encode(key: bytes, owner: str, tokens: str, tensors: Sequence[torch.Tensor]) -> bytes:
    """Return the file of a block. Raises CheckpointError for tensors that no such file can hold."""
    named = {f"{number:06}": tensor.cpu() for number, tensor in enumerate(tensors)}
    metadata = {"format": FORMAT, "key": key.hex(), "owner": owner, "tokens": tokens, "checksum": _BLANK}
    try:
        data = save(named, metadata)
    except KeyError as error:
        raise CheckpointError(f"safetensors files cannot hold tensors of {error}") from error
    at = _checksum_at(data)
    return b"".join((data[:at], _checksum(data, at), data[at + len(_BLANK) :]))


def decode(data: bytes, key: bytes) -> BlockFile:
    """Return what a file holds.

    Raises:
        CheckpointError: it is truncated, altered, of another format, or another block's.
    """
    at = _checksum_at(data)
    if data[at : at + len(_BLANK)] != _checksum(data, at):
        raise CheckpointError("the checksum does not match")
    try:
        (metadata, _), tensors = _head(io.BytesIO(data)), load(data)
        if (metadata["format"], metadata["key"]) != (FORMAT, key.hex()):
            raise CheckpointError("it is another block, or of another format")
        return BlockFile(metadata["owner"], metadata["tokens"], tuple(tensors[name] for name in sorted(tensors)))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"it is not what was written ({error})") from error


def _checksum_at(data: bytes) -> int:
    """Return where the digits of the checksum are.

    Raises:
        CheckpointError: there are none.
    """
    at = data.find(_FIELD, 8, 8 + int.from_bytes(data[:8], "little"))
    if at < 0 or at + len(_FIELD) + len(_BLANK) > len(data):
        raise CheckpointError("there is no checksum")
    return at + len(_FIELD)


def _checksum(data: bytes, at: int) -> bytes:
    """Return the checksum, as hexadecimal digits, of all bytes but its own."""
    view = memoryview(data)
    digest = hashlib.blake2b(view[:at], digest_size=32)
    digest.update(view[at + len(_BLANK) :])
    return digest.hexdigest().encode()
