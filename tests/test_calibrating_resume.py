"""A run that is interrupted anywhere goes on to the same bits; folders of another run, or damaged ones, are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, prompt

import hf_accel
from hf_accel import CheckpointError, ConfigError, GPTQConfig, StorageError
from hf_accel.quantization.calibrating import folder as keeping
from hf_accel.quantization.modules.linear import QuantizedLinear

TEXT = prompt(12, 48)


def config(folder: Path | None, **values: Any) -> GPTQConfig:
    given = {"bits": 2, "group_size": 32, "refine_steps": 3, "folder": None if folder is None else str(folder)}
    return GPTQConfig(**(given | values))  # type: ignore[arg-type]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": tensor.clone()
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for name, tensor in module.named_buffers()
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def optimised(folder: Path | None, interrupt: Any = None, **values: Any) -> dict[str, torch.Tensor]:
    model = build("llama")
    hf_accel.optimize(model, config(folder, **values), calibration=TEXT, progress=interrupt or (lambda: None))
    return state(model)


class Killed(BaseException):
    """What no handler of errors catches."""


def killing(after: int) -> Any:
    left = [after]

    def progress() -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return progress


@pytest.mark.parametrize("refine_steps", [0, 3])
def test_a_run_killed_at_ten_random_points_goes_on_to_the_same_bits(tmp_path: Path, refine_steps: int) -> None:
    calls = [0]
    expected = optimised(None, lambda: calls.__setitem__(0, calls[0] + 1), refine_steps=refine_steps)
    points = random.Random(refine_steps)
    for _ in range(10):
        with pytest.raises(Killed):
            optimised(tmp_path / "run", killing(points.randint(1, max(2, calls[0] // 3))), refine_steps=refine_steps)
    assert same(optimised(tmp_path / "run", refine_steps=refine_steps), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_accel.quantization.calibrating.solving.solve", None)  # nothing is left to solve
        assert same(optimised(tmp_path / "run", refine_steps=refine_steps), expected), "all of it from the folder"
    assert not list((tmp_path / "run").glob("*.bin")), "activations are gone once all layers are finished"


@pytest.mark.parametrize("point", ["save", "activations"])
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bits(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = optimised(None)
    if point == "save":
        write = keeping.save_file

        def broken(tensors: Any, file: Path, **options: Any) -> None:
            if file.name.startswith("layer-1"):
                file.write_bytes(b"half of a lay")
                raise Killed
            write(tensors, file, **options)

        monkeypatch.setattr(keeping, "save_file", broken)
    else:
        run = keeping.LayerFolder.save

        def killed(self: Any, index: int, *args: Any) -> None:
            run(self, index, *args)
            if index == 1:
                raise Killed

        monkeypatch.setattr(keeping.LayerFolder, "save", killed)
    with pytest.raises(Killed):
        optimised(tmp_path / "run")
    monkeypatch.undo()
    assert same(optimised(tmp_path / "run"), expected)


@pytest.mark.parametrize("change", ["weights", "text", "bits", "damping"])
def test_a_folder_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    with pytest.raises(Killed):
        optimised(tmp_path / "run", killing(12))
    model = build("llama")
    if change == "weights":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    text = TEXT.clone()
    if change == "text":
        text[0, 5] += 1
    values: dict[str, Any] = {"bits": {"bits": 3}, "damping": {"damping": 0.02}}.get(change, {})
    with pytest.raises(ConfigError, match="finished layers of another run"):
        hf_accel.optimize(model, config(tmp_path / "run", **values), calibration=text)
    with pytest.raises(hf_accel.ConflictError):
        hf_accel.report(model)


def test_folders_that_are_none_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be a folder for finished layers"):
        optimised(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        optimised(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    run = tmp_path / "run"
    with pytest.raises(Killed):
        optimised(run, killing(15))
    layer, activations = run / "layer-0.safetensors", next(run.glob("original-1.bin"))
    kept, rows = layer.read_bytes(), activations.read_bytes()
    layer.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CheckpointError, match=r"layer-0\.safetensors is damaged"):
        optimised(run)
    layer.write_bytes(kept)
    activations.write_bytes(rows[:-4])
    with pytest.raises(StorageError, match="has not the size"):
        optimised(run)
    activations.write_bytes(rows)
    (run / "calibration.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"calibration\.json is damaged"):
        optimised(run)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"cannot hold [\d,]+ bytes of activations \(No space left on device\)"):
        optimised(None, max_activation_bytes=0)
