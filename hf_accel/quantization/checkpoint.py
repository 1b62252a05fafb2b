"""Reading safetensors of a folder: every tensor by name, one at a time, and every fault with its file and tensor.

Cost: nothing but the tensor that is asked for; files are mapped, not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_accel.errors import CheckpointError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Is {path.parent} a saved model?") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it holds no JSON ({error}). Save or download it anew.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is of another format: it holds a {type(found).__name__}, not an object.")
    return found


class Checkpoint:
    """The tensors of `stem`.safetensors, or of the shards that `stem`.safetensors.index.json names.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors, or does not hold what the index says.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        self.files: dict[str, Path] = {}
        self.listing = single
        self._open: tuple[Path, Any] | None = None
        if single.exists() or not index.exists():
            self.files = dict.fromkeys(self._names(single), single)
            return
        self.listing = index
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} is damaged: it has no weight_map from tensors to files.")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names the file {file!r}, which lies outside of its folder.")
            self.files |= dict.fromkeys(self._names(folder / file), folder / file)
        for name, file in weight_map.items():
            if self.files.get(name) != folder / file:
                raise CheckpointError(f"{folder / file} has no tensor {name}, which {index.name} says it holds.")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._file(self.files[name]).get_slice(name).get_shape())

    def tensor(self, name: str, shape: Iterable[int], dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Tensor:
        """Return the tensor called `name`, which has the shape and one of the dtypes. It may lie in the mapped file.

        Raises:
            CheckpointError: it is missing, cannot be read, or has another shape or dtype.
        """
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(f"{self.listing} lacks the tensor {name}; the checkpoint is not complete.")
        found_shape = self.shape(name)
        if found_shape != tuple(shape):
            raise self.damaged(name, f"its shape is {found_shape}; the model's config asks for {tuple(shape)}")
        try:
            tensor = self._file(path).get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise self.damaged(name, f"it cannot be read ({error})") from error
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.damaged(name, f"it is {str(tensor.dtype).removeprefix('torch.')}; {wanted} is expected")
        return tensor  # type: ignore[no-any-return]

    def damaged(self, name: str, fault: str) -> CheckpointError:
        """Return the error that says what is wrong with a tensor."""
        return CheckpointError(
            f"{self.files.get(name, self.listing)}, tensor {name}: {fault}. Save or download the checkpoint anew."
        )

    def _names(self, path: Path) -> list[str]:
        return list(self._file(path).keys())

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            if not path.exists():
                raise CheckpointError(f"{path} is missing; the checkpoint is not complete. Save or download it anew.")
            try:
                self._open = path, safe_open(path, "pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is damaged, truncated or no safetensors file ({error}). Save or download it anew."
                ) from error
        return self._open[1]
