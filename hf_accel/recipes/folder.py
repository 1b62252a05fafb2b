"""The folder of a run: whose run it is, what it decided once, and its checkpoints."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.errors import CheckpointError, ConfigError

RECORD, TRAINED, PROGRESS = "uptrain.json", "trained.pt", "progress.json"
_LAST_WRITTEN = "trainer_state.json"  # by transformers' Trainer: a checkpoint without it was interrupted


class RunFolder:
    """Decisions and checkpoints of one run below a folder; without a folder everything is kept in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.record: dict[str, Any] = {}
        if path is None:
            return
        if path.exists() and not path.is_dir():
            raise ConfigError(f"out is a folder for checkpoints and the learning curve; {str(path)!r} is a file.")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"out cannot be made: {path} ({error.strerror or error}). Name another folder."
            ) from error

    def file(self, name: str) -> Path | None:
        return None if self.path is None else self.path / name

    def open(self, run: str) -> None:
        """Take up the record of an earlier sitting, if there is one.

        Raises:
            ConfigError: the folder is of another run.
            CheckpointError: the record is damaged.
        """
        file = self.file(RECORD)
        if file is not None and file.exists():
            try:
                self.record = json.loads(file.read_text(encoding="utf-8"))
                found = self.record["run"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{file} is damaged; delete the folder or name another.") from error
            if found != run:
                raise ConfigError(
                    f"{self.path} has checkpoints of another run: other weights, text or settings. Give the same "
                    "ones to continue it, or name another folder."
                )
        elif file is not None and self.checkpoints():
            raise ConfigError(f"{self.path} has checkpoints of another program. Name another folder.")
        self.decide(run=run)

    def decide(self, **values: Any) -> None:
        """Record what was decided once for the run."""
        self.record |= values
        file = self.file(RECORD)
        if file is not None:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(self.record, indent=2), encoding="utf-8")
            part.replace(file)

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, the newest last."""
        if self.path is None:
            return []
        found = [path for path in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        found = [path for path in found if (path / _LAST_WRITTEN).exists()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def last(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint and how far it had come.

        Raises:
            CheckpointError: it is damaged.
        """
        if not (found := self.checkpoints()):
            return None
        try:
            return found[-1], json.loads((found[-1] / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{found[-1]} is damaged; delete it to continue from the one before.") from error


def save_trained(model: nn.Module, folder: str, progress: dict[str, Any]) -> None:
    """Write what training changes: parameters that are trained, and buffers."""
    os.makedirs(folder, exist_ok=True)
    tensors: dict[str, Tensor] = {name: own.detach() for name, own in model.named_parameters() if own.requires_grad}
    tensors |= {f"buffer {name}": tensor for name, tensor in model.named_buffers()}
    torch.save(tensors, Path(folder) / TRAINED)
    (Path(folder) / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")


def load_trained(model: nn.Module, folder: str) -> None:
    """Put back what `save_trained` wrote, bit for bit.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    file = Path(folder) / TRAINED
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors.pop(name))
            for name, buffer in model.named_buffers():
                buffer.copy_(tensors.pop(f"buffer {name}"))
    except Exception as error:
        raise CheckpointError(f"{file} is damaged or of another model; delete {folder} to begin before it.") from error
    if tensors:
        raise CheckpointError(f"{file} holds parameters that this model does not have: {', '.join(list(tensors)[:3])}.")
