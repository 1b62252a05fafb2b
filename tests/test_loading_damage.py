"""What cannot be read in few bits: a clear error, and nothing half loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import FOUR, written
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel import CheckpointError, ConfigError, DecodingConfig, GPTQConfig, UnsupportedModelError, WeightOnlyConfig

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name, message, change",
    [
        (UP, "lack", lambda t: t.pop(UP)),
        (NORM, "lack", lambda t: t.pop(NORM)),
        ("lm_head.weight", "lack", lambda t: t.pop("lm_head.weight")),
        (UP, r"shape \(96, 63\)", lambda t: t.update({UP: t[UP][:, 1:].contiguous()})),
        (NORM, r"shape \(3,\)", lambda t: t.update({NORM: torch.ones(3)})),
        ("another.weight", "does not have", lambda t: t.update({"another.weight": torch.ones(3)})),
        (UP, "type F8_E4M3 are not read", lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
    ],
)
def test_wrong_tensors_are_named(name: str, message: str, change: Any, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as error:
        hf_accel.load(folder, FOUR)
    assert name in str(error.value)
    assert str(folder) in str(error.value) or "files" in str(error.value)


@pytest.mark.parametrize("change", [lambda t: t.pop(UP), lambda t: t.update({UP: t[UP][:, 1:].contiguous()})])
def test_loading_by_transformers_fills_in_no_weight(change: Any, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=UP):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR)


def test_a_weight_that_is_no_number(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    edit(folder, lambda t: t[UP].view(-1)[5:6].fill_(float("nan")))
    for load in (hf_accel.load, lambda *given: AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR)):
        with pytest.raises(UnsupportedModelError, match=f"{UP} of the files holds NaN"):
            load(folder, FOUR)


@pytest.mark.parametrize("kept", [0, 7, 100, -1, -1000])
def test_files_cut_short(kept: int, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", sharded=True)
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=path.name):
        hf_accel.load(folder, FOUR)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, tensor .*it ends after"):
        hf_accel.load(folder, FOUR, progress=lambda: path.write_bytes(content[: len(content) // 2]) and None)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", sharded=True)
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        hf_accel.load(folder, FOUR)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder, message in ((tmp_path, "cannot be loaded|damaged|missing"), (tmp_path / "none", "cannot be loaded")):
        with pytest.raises(CheckpointError, match=message):
            hf_accel.load(folder, FOUR)


def test_configs_that_do_not_round_to_nearest(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    for config in (GPTQConfig(bits=4), DecodingConfig()):
        with pytest.raises(ConfigError, match=f"a {type(config).__name__} was given"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(ConfigError, match="several were given"):
        hf_accel.load(folder, [FOUR, WeightOnlyConfig(bits=8)])
    for options in ({"calibration": "some text"}, {"max_kl": 0.1}):
        with pytest.raises(ConfigError, match="measures against the original"):
            hf_accel.load(folder, FOUR, **options)
    with pytest.raises(ConfigError, match="takes a goal, configs"):
        hf_accel.load(folder, 4)  # type: ignore[arg-type]
    devices = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ConfigError, match="one device"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR, device_map=devices)


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match=r"'\*\.none' matches no module"):
        hf_accel.load(folder, WeightOnlyConfig(layers={"*.none": 8}))


def test_dtypes_that_have_no_kernels(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match=r"torch\.float64 are not quantized"):
        hf_accel.load(folder, FOUR, dtype=torch.float64)
    with pytest.raises(ConfigError, match="floating-point dtype"):
        hf_accel.load(folder, FOUR, dtype="int8")


def test_weights_that_are_packed_already(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    hf_accel.save_pretrained(hf_accel.load(folder, FOUR), tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match="packed already"):
        hf_accel.load(tmp_path / "packed", FOUR)
    assert "changes: none" in str(hf_accel.report(hf_accel.load(tmp_path / "packed", [])))


def test_budgets(tmp_path: Path) -> None:
    """The most bits whose weights, with the largest that is rounded, take no more; the bound itself is enough."""
    folder = written(tmp_path, "llama")
    largest = 128 * 64 * 4
    assert hf_accel.report(hf_accel.load(folder, [], memory_budget_bytes=10**9)).patched_weight_bytes is None
    with pytest.raises(ConfigError, match=r"memory_budget_bytes=\d+ is the least that fits") as error:
        hf_accel.load(folder, [], memory_budget_bytes=1)
    least = int(re.findall(r"memory_budget_bytes=(\d+) is", str(error.value))[0])
    budget, seen = hf_accel.report(hf_accel.load(folder, [])).weight_bytes - 1, []
    while budget >= least:
        report = hf_accel.report(hf_accel.load(folder, [], memory_budget_bytes=budget))
        config: Any = report.applied[0].config
        seen.append((config.bits, config.group_size or 0, config.embeddings or 0))
        needed = report.patched_weight_bytes + largest
        assert needed <= budget
        again = hf_accel.load(folder, [], memory_budget_bytes=needed)
        assert hf_accel.report(again).applied[0].config == config
        budget = needed - 1
    assert needed == least
    assert {bits for bits, *_ in seen} == {8, 4, 3, 2}
    assert seen == sorted(seen, key=lambda found: (-found[0], found[1], found[2]))


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "6 GB"])
def test_budgets_that_are_no_numbers(budget: Any, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    with pytest.raises(ConfigError, match="whole number, at least 1"):
        hf_accel.load(folder, [], memory_budget_bytes=budget)
    with pytest.raises(ConfigError, match="Give one"):
        hf_accel.load(folder, FOUR, memory_budget_bytes=10**9)


def test_configs_that_describe_another_model(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (({"num_hidden_layers": 4}, "lack"), ({"num_hidden_layers": 2}, "does not have")):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match=message):
            hf_accel.load(folder, FOUR)
