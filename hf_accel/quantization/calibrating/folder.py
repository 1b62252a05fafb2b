"""Finished layers in a folder, so that a run that was interrupted goes on where it was, to the same bits.

A layer is written beside its place and moved there once it is complete: what is there is whole. What the next layer
reads lies there, too. The folder says whose run it is; another model, text or config is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_accel.errors import CheckpointError, ConfigError, described
from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.calibrating.findings import Finding

_RECORD = "calibration.json"
_VALUE, _POWER = "value of ", "power of "


class LayerFolder:
    """The finished layers of one run.

    Raises:
        ConfigError: the folder is a file, cannot be made, or is of another run.
        CheckpointError: its record is damaged.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        record = path / _RECORD
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_new, is_empty = not record.exists(), not any(path.iterdir())
            text = json.dumps({"run": run}) if is_new else record.read_text(encoding="utf-8")
            if is_new and is_empty:
                _write_text(record, text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be a folder for finished layers ({error.strerror}).") from error
        if is_new and not is_empty:
            raise ConfigError(f"{path} holds other files. Name an empty folder, or one of a run to go on with.")
        try:
            found = json.loads(text)["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{record} is damaged; delete {path} to begin anew.") from error
        if found != run:
            raise ConfigError(
                f"{path} has finished layers of another run: of another model, text or config. Give the same to go on "
                "with it, or name another folder."
            )

    def finished(self, layers: int, names: Sequence[str]) -> int:
        """Return how many of `layers` are finished, the first ones; `names`: files that must be there for the next.

        After the last one nothing is read any more, and no file needs to be there.
        """
        count = 0
        while count < layers and self._file(count).exists():
            count += 1
        while 0 < count < layers and not all((self.path / name.format(count)).exists() for name in names):
            count -= 1
        return count

    def save(
        self,
        index: int,
        affines: dict[str, Affine],
        findings: Sequence[Finding],
        values: dict[str, Tensor],
        powers: dict[str, Tensor],
    ) -> None:
        """Keep what was made of a layer: codes by path, what was found, values of parameters, powers of inputs."""
        tensors = {f"{_VALUE}{path}": value for path, value in values.items()}
        tensors |= {f"{_POWER}{path}": value for path, value in powers.items()}
        schemes = {}
        for path, affine in affines.items():
            tensors |= {f"{path}.codes": affine.codes.contiguous(), f"{path}.scales": affine.scales.contiguous()}
            if affine.zeros is not None:
                tensors[f"{path}.zeros"] = affine.zeros.contiguous()
            schemes[path] = [affine.scheme.bits, affine.scheme.group_size, affine.scheme.symmetric]
        about = {
            "schemes": schemes,
            "findings": [finding.to_dict() for finding in findings],
            "values": list(values),
            "powers": list(powers),
        }
        part = self._file(index).with_suffix(".part")
        save_file(
            {name: t.cpu().contiguous() for name, t in tensors.items()}, part, metadata={"layer": json.dumps(about)}
        )
        part.replace(self._file(index))

    def load(
        self, index: int, device: torch.device
    ) -> tuple[dict[str, Affine], list[Finding], dict[str, Tensor], dict[str, Tensor]]:
        """Return what `save` kept.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = self._file(index)
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["layer"])
                affines = {}
                for path, (bits, group, symmetric) in about["schemes"].items():
                    codes, scales = (opened.get_tensor(f"{path}.{name}").to(device) for name in ("codes", "scales"))
                    zeros = None if symmetric else opened.get_tensor(f"{path}.zeros").to(device)
                    affines[path] = Affine(codes, scales, zeros, Scheme(bits, group, symmetric))
                values, powers = (
                    {path: opened.get_tensor(f"{kind}{path}").to(device) for path in about[name]}
                    for kind, name in ((_VALUE, "values"), (_POWER, "powers"))
                )
                return affines, [Finding(**finding) for finding in about["findings"]], values, powers
        except Exception as error:  # safetensors' own errors, too
            raise CheckpointError(
                f"{file} is damaged ({described(error)}); delete it, and the layers after it, to make it anew."
            ) from error

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index}.safetensors"


def _write_text(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
