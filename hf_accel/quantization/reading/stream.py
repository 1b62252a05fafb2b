"""The tensors of safetensors files, read one at a time into memory of their own, which ends with them.

A mapped file stays in the memory of the process as far as it was read; here nothing is left of a tensor that was given
up. Stands for the state of a model in transformers' `from_pretrained`. Cost: one tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import CheckpointError
from hf_accel.kernels import pages
from hf_accel.quantization.files.checkpoint import Checkpoint

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PIECE = 1 << 30  # bytes of one read: systems read no more than 2 GB at once


class Stored:
    """A tensor in a file: `stored[...]` reads it."""

    def __init__(self, path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> None:
        self.path, self.name, self.dtype, self.shape, self.start = path, name, dtype, shape, start

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Return the tensor; transformers asks for all of it, or for a part.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        values = pages.advise(torch.empty(self.shape, dtype=self.dtype))
        if self.nbytes:
            _fill(values.reshape(-1).view(torch.uint8), self)
        return values if index is Ellipsis else values[index]


def _fill(bytes_: Tensor, stored: Stored) -> None:
    view = memoryview(bytes_.numpy().data)
    done = 0
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.start)
            while done < len(view):
                count = file.readinto(view[done : done + _PIECE])
                if not count:
                    raise OSError(f"it ends after {stored.start + done} bytes")
                done += count
    except OSError as error:
        raise CheckpointError(
            f"{stored.path}, tensor {stored.name}: it cannot be read ({error}). Save or download the checkpoint anew."
        ) from error


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Return name -> tensor of all files of a checkpoint, none of them read.

    Raises:
        CheckpointError: a header is damaged, or a tensor is of a dtype that is not known here.
    """
    found: dict[str, Stored] = {}
    for path in dict.fromkeys(checkpoint.files.values()):
        for name, (kind, shape, start) in _entries(path).items():
            if kind not in DTYPES:
                raise CheckpointError(
                    f"{path}, tensor {name}: values of the type {kind} are not read. Load the folder with "
                    "AutoModelForCausalLM."
                )
            found[name] = Stored(path, name, DTYPES[kind], shape, start)
    return found


def header(path: Path) -> bytes:
    """Return the header of a safetensors file, its length before it.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        return prefix + file.read(min(length, os.fstat(file.fileno()).st_size))


def _entries(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    try:
        found = header(path)
        content = json.loads(found[8:])
        content.pop("__metadata__", None)
        return {
            name: (entry["dtype"], tuple(entry["shape"]), len(found) + entry["data_offsets"][0])
            for name, entry in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}). Save or download it anew."
        ) from error
