"""`hf-accel quantize --method` writes what the library computes, goes on after a kill, and says what fits no method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, prompt
from test_cli_quantize import logits, run, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import GPTQConfig
from hf_accel.assets import demo_path
from hf_accel.cli.methods import METHODS
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.quantization.calibrating import solving

OPTIONS = ("--dtype", "float32", "--threads", "1", "--group-size", "32")


@pytest.fixture(autouse=True)
def _offline_and_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="text")
def _text(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path) -> Path:
    """Return a file of Python text in `folder`."""
    file = folder / "text.py"
    file.write_text(Path(__file__).read_text()[:4000])
    return file


def in_memory(config: GPTQConfig, text: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(demo_path())
    return logits(hf_accel.optimize(model, config, calibration=text.read_text(), tokenizer=words))


@pytest.mark.parametrize(
    "options, config",
    [
        (("--method", "gptq", "--bits", "3"), GPTQConfig(bits=3, group_size=32)),
        (("--method", "gptq", "--bits", "2", "--refine-steps", "1"), GPTQConfig(bits=2, group_size=32, refine_steps=1)),
        (("--method", "awq", "--bits", "4"), GPTQConfig(bits=4, group_size=32, scaling="awq", solver="nearest")),
    ],
    ids=["gptq", "refined", "awq"],
)
def test_what_is_written_is_what_the_library_computes(
    options: tuple[str, ...], config: GPTQConfig, text: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", demo_path(), tmp_path / "out", *options, *OPTIONS, "--calibration", text)
    data = json.loads(succeed(*arguments, "--json").stdout)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "out")), in_memory(config, text))
    assert data["method"] == options[1]
    [change] = [change for change in data["changes"] if change["config"]["type"] == "GPTQConfig"]
    assert change["config"]["bits"] == config.bits
    assert data["calibration"]["products"][0]["tokens"] == data["split"]["fitted"]
    assert 3 * data["split"]["measured"] <= data["split"]["fitted"]
    assert data["quality"]["tokens"] < data["split"]["measured"], "of the first token of a row nothing is predicted"
    assert not (tmp_path / "out.partial").exists()


def test_without_a_text_the_model_writes_two(tmp_path: Path) -> None:
    shown = succeed("quantize", demo_path(), tmp_path, "--method", "gptq", "--bits", "3", *OPTIONS).stdout
    assert "products solved on" in shown
    assert "tokens of the model's own samples" in shown
    assert "kept back" not in shown


def test_a_run_that_is_interrupted_goes_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ("quantize", demo_path(), out, "--method", "gptq", "--bits", "3", *OPTIONS, "--calibration", text)
    solve, calls = solving.solve, [0]

    def failing(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 10:  # in the second layer
            raise KeyboardInterrupt
        return solve(*given)

    with monkeypatch.context() as patch:
        patch.setattr(solving, "solve", failing)
        assert run(*arguments, "--resume").exit_code != 0
    assert [file.name for file in (tmp_path / "out.partial").glob("layer-*")] == ["layer-0.safetensors"]
    assert not out.exists()
    other = run(*arguments, "--resume", "--refine-steps", "2")
    assert other.exit_code == 2
    assert "of another run" in " ".join(other.stderr.split())
    monkeypatch.setattr(solving, "solve", lambda *given: calls.append(1) or solve(*given))
    calls.clear()
    succeed(*arguments, "--resume")
    assert 0 < len(calls) < 7 * len(hf_accel.from_pretrained(out).model.layers), "the first layer was not made again"
    assert not (tmp_path / "out.partial").exists()
    assert torch.equal(logits(hf_accel.from_pretrained(out)), in_memory(GPTQConfig(bits=3, group_size=32), text)), (
        "the same bits"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (("--method", "magic"), f"--method is one of {', '.join(METHODS)}; 'magic' was given"),
        (("--method", "gptq", "--bits", "5"), "GPTQConfig.bits is 2, 3, 4 or 8; 5 was given"),
        (("--method", "gptq", "--bits", "2.5"), "GPTQConfig.bits is 2, 3, 4 or 8; 2.5 was given"),
        (("--resume",), "--resume belongs to --method gptq, awq"),
        (("--refine-steps", "3"), "--refine-steps belongs to --method gptq, awq"),
        (("--method", "gptq", "--refine-steps", "-1"), "refine_steps"),
        (("--method", "gptq", "--calibration", "{short}"), "tells too little"),
    ],
    ids=str,
)
def test_errors_are_one_message(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("def add(a, b):")
    given = (option.format(short=short) for option in options)
    result = run("quantize", demo_path(), tmp_path / "out", *given, "--dtype", "float32")
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [{}, {"refine_steps": 2}, {"scaling": "awq"}, {"scaling": "awq", "solver": "nearest", "head": None}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3"])
def test_the_bar_ends_where_it_says(name: str, values: dict[str, Any]) -> None:
    model, calls = build(name), [0]
    config = GPTQConfig(bits=3, group_size=32, **values)
    if name == "mixtral" and config.solver == "nearest":
        return  # has no decoder layer that is described
    expected = Patcher.for_config(config).parts(Setting.of(model))

    def progress() -> None:
        calls[0] += 1

    hf_accel.optimize(model, config, calibration=prompt(8, 48), progress=progress)
    assert calls == [expected]
