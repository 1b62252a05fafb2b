"""Reading safetensors of a folder: every tensor by name, one at a time, and every fault with its file and tensor.

Cost: nothing but the tensor that is asked for, and its checksum where it was saved with one; files are mapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_accel.errors import CheckpointError, described
from hf_accel.quantization.files.integrity import KEY, Stamp, changed_values, checksum

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
    except (ValueError, RecursionError) as error:
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
        self._open: tuple[Path, Any, Stamp | None] | None = None
        self._stored: dict[str, str] = {}  # name in the model -> in the file, where they differ
        self._sums: dict[str, str] = {}
        self._digests: dict[str, Any] = {}
        if single.exists() or not index.exists():
            self.files = dict.fromkeys(self._names(single), single)
            return
        self.listing = index
        content = read_json(index)
        weight_map, about = content.get("weight_map"), content.get("metadata")
        digests = about.get(KEY) if isinstance(about, dict) else None
        self._digests = digests if isinstance(digests, dict) else {}
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

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors, from now on, by the names in the model that `names` gives for those in the files."""
        self.files = {names.get(name, name): path for name, path in self.files.items()}
        self._stored = {name: stored for stored, name in names.items() if name != stored}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._file(self.files[name])[0].get_slice(self._stored.get(name, name)).get_shape())

    def is_stamped(self, name: str) -> bool:
        """Return whether the file of a tensor was written by us."""
        return name in self.files and self._file(self.files[name])[1] is not None

    def tensor(self, name: str, shape: Iterable[int], dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Tensor:
        """Return the tensor called `name`, which has the shape and one of the dtypes. It may lie in the mapped file.

        Raises:
            CheckpointError: it is missing, cannot be read, has another shape or dtype, or is not what was saved.
        """
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(f"{self.listing} lacks the tensor {name}; the checkpoint is not complete.")
        try:
            found_shape = self.shape(name)
            if found_shape != tuple(shape):
                raise self.damaged(name, f"its shape is {found_shape}; the model's config asks for {tuple(shape)}")
            file, stamp = self._file(path)
            tensor: Tensor = file.get_tensor(self._stored.get(name, name))
        except CheckpointError:
            raise
        except Exception as error:  # safetensors' own errors, and torch's for dtypes that it does not know
            raise self.damaged(name, f"it cannot be read ({described(error)})") from error
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.damaged(name, f"it is {str(tensor.dtype).removeprefix('torch.')}; {wanted} is expected")
        if stamp is not None and stamp.sums.get(name) != checksum(name, tensor):
            raise self.damaged(name, "its values are not those that were saved (checksum)")
        return tensor

    def check_config(self, found: Mapping[str, Any], without: str | None = None) -> None:
        """Check that config.json is the one that was saved with the tensors, if the files say which that was.

        without: a name in it that is left out.

        Raises:
            CheckpointError: it is another.
        """
        for path in sorted(set(self.files.values())):
            stamp = self._file(path)[1]
            changed = [] if stamp is None else changed_values(stamp.config, found)
            if changed := [name for name in changed if without is None or name.partition(".")[0] != without]:
                raise CheckpointError(
                    f"{path.with_name('config.json')} is not the one that was saved with {path.name}: {changed[0]} "
                    "differs. Restore the file; to change a value, change it in the loaded model's config and save."
                )

    def damaged(self, name: str, fault: str) -> CheckpointError:
        """Return the error that says what is wrong with a tensor."""
        return CheckpointError(
            f"{self.files.get(name, self.listing)}, tensor {name}: {fault}. Save or download the checkpoint anew."
        )

    def _names(self, path: Path) -> list[str]:
        return list(self._file(path)[0].keys())

    def _file(self, path: Path) -> tuple[Any, Stamp | None]:
        if self._open is None or self._open[0] != path:
            if not path.exists():
                raise CheckpointError(f"{path} is missing; the checkpoint is not complete. Save or download it anew.")
            try:
                file: Any = safe_open(path, "pt")
                stamp = Stamp.of(file.metadata())
            except Exception as error:
                raise CheckpointError(
                    f"{path} is damaged, truncated or no safetensors file ({error}). Save or download it anew."
                ) from error
            if not self._fits(path.name, stamp):
                raise CheckpointError(
                    f"{path} is part of another save than the files beside it. Save or download the checkpoint anew."
                )
            self._open = path, file, stamp
        return self._open[1:]

    def _fits(self, file: str, stamp: Stamp | None) -> bool:
        """Return whether a file is the one that the index and the other files speak of, as far as they do."""
        if file in self._digests and (stamp is None or stamp.digest != self._digests[file]):
            return False
        return stamp is None or all(self._sums.setdefault(name, found) == found for name, found in stamp.sums.items())
