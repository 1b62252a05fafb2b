"""Packs that are kept beside models: where one lies, and whether it still is of these files, this config and versions.

Files are the same by name, size, time of change, header and a sample of their contents; config files by all they hold.
Cost: 64 reads of 4 KB per file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import xxhash

from hf_accel.errors import CheckpointError
from hf_accel.measure import versions
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.reading.mapped import described, rebuilt
from hf_accel.quantization.reading.pack import Pack, write
from hf_accel.quantization.reading.stream import header

SAMPLES, SAMPLE = 64, 4096  # how many places of a file are looked at, and bytes of each


class Kept:
    """The pack of one model, in one dtype and rounding.

    place: the folder of the model's files; home: the folder that packs are kept in; created.

    Raises:
        CheckpointError: nothing can be kept there.
    """

    def __init__(self, place: Path, home: Path, rounding: WeightOnlyConfig, dtype: torch.dtype) -> None:
        asked = json.dumps([rounding.to_dict(), str(dtype)], sort_keys=True)
        self.place, self.path = place, home / f"{xxhash.xxh3_128_hexdigest(asked.encode())}.pack"
        self.identity = {"asked": asked, "versions": versions(), "files": [_told(path) for path in _files(place)]}
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"The packed model cannot be kept in {home} ({error}). Make room there, or load with cache=False."
            ) from error
        if not os.access(home, os.W_OK):
            raise CheckpointError(f"The packed model cannot be kept in {home}: it may not be written. Use cache=False.")

    def open(self, config: Any, *, large_pages: bool = False) -> tuple[Any, dict[str, Any]] | None:
        """Return the model, mapped or read into large pages, and what was told of it; None without a pack of this."""
        try:
            pack = Pack(self.path, is_read=large_pages)
            if json.loads(json.dumps(self.identity)) != pack.about["identity"]:
                return None
            return rebuilt(config, pack.about["model"], pack), pack.about["told"]
        except (CheckpointError, KeyError, TypeError):  # damaged, or written by another version of this code
            return None

    def keep(self, model: Any, told: dict[str, Any]) -> None:
        """Write the pack; one of other files, or a damaged one, is replaced.

        Raises:
            CheckpointError: it cannot be written; there is no part of it.
        """
        about, tensors = described(model)
        write(self.path, {"identity": self.identity, "model": about, "told": told}, tensors)


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.suffix == ".safetensors" or path.name.endswith(".json"))


def _told(path: Path) -> list[Any]:
    """Return name, size, time of change and digest of a file."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns, _digest(path, found.st_size)]


def _digest(path: Path, size: int) -> str:
    if path.suffix == ".json":
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    digest = xxhash.xxh3_128(header(path))
    with open(path, "rb") as file:
        for place in range(0, size, max(SAMPLE, size // SAMPLES)):
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
