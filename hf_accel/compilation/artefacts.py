"""What torch.compile made, kept in a folder for the next process, which then only traces."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import StorageError, described


def compiler_obstacle(device: torch.device) -> str | None:
    """Return why torch.compile can make no kernels for `device`, None if it can."""
    if device.type == "cuda":
        import importlib.util

        return None if importlib.util.find_spec("triton") else "torch.compile needs triton, which is not installed."
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if any(name and shutil.which(name) for name in names):
        return None
    return "torch.compile needs a C++ compiler, and there is none: install g++ or clang++, or set CXX."


class Artefacts:
    """The file of a folder in which a model's compiled kernels are, by model, device and version of torch.

    What is loaded from it is run: the folder must be one that nobody else writes to.
    """

    def __init__(self, folder: str, model: Any) -> None:
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
        identity = (torch.__version__, device, str(model.dtype), model.config.to_json_string(use_diff=False))
        name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:20]
        self.path = Path(folder) / f"{name}.artefacts"

    def load(self) -> None:
        """Let torch.compile find what an earlier process has made, if there is any.

        Raises:
            StorageError: the file cannot be read, or is damaged.
        """
        if not self.path.exists():
            return
        try:
            found = torch.compiler.load_cache_artifacts(self.path.read_bytes())
        except Exception as error:  # whatever damaged pickles raise
            raise StorageError(f"{self.path} cannot be read ({described(error)}). Delete it.") from error
        if found is None:
            raise StorageError(f"{self.path} is damaged. Delete it.")

    def save(self) -> None:
        """Keep what was compiled so far in this process; a file appears whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                file.write(made[0])
            os.replace(file.name, self.path)
        except OSError as error:
            raise StorageError(
                f"Compiled kernels cannot be kept in {self.path.parent} ({described(error)}). Name another folder."
            ) from error
