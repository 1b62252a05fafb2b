"""`hf-accel quantize --method` writes what the library computes, goes on after a kill, and says what fits no method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, prompt
from test_awq import uneven
from test_cli_quantize import logits, run, succeed
from texts import tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import GPTQConfig
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved model with its tokenizer, and a text beside it."""
    path = tmp_path_factory.mktemp("small")
    words = tokenizer()
    uneven("qwen3").save_pretrained(path)
    words.save_pretrained(path)
    (path / "text.txt").write_text(words.decode(prompt(1, 2600)[0]))
    return path


def in_memory(config: GPTQConfig, folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (folder / "text.txt").read_text()
    return logits(hf_accel.optimize(model, config, calibration=text, tokenizer=AutoTokenizer.from_pretrained(folder)))


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
    options: tuple[str, ...], config: GPTQConfig, folder: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", folder, tmp_path / "out", *options, *OPTIONS, "--calibration", folder / "text.txt")
    data = json.loads(succeed(*arguments, "--json").stdout)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "out")), in_memory(config, folder))
    assert data["method"] == options[1]
    [change] = [change for change in data["changes"] if change["config"]["type"] == "GPTQConfig"]
    assert change["config"]["bits"] == config.bits
    assert data["gptq"]["products"][0]["tokens"] == data["split"]["fitted"]
    assert 0 < data["split"]["measured"] < data["split"]["fitted"]
    assert data["quality"]["tokens"] < data["split"]["measured"], "of the first token of a row nothing is predicted"
    assert not (tmp_path / "out.partial").exists()


def test_bits_where_they_matter(folder: Path, tmp_path: Path) -> None:
    options = ("--method", "mixed", "--bits", "4.6", *OPTIONS, "--calibration", folder / "text.txt", "--json")
    data = json.loads(succeed("quantize", folder, tmp_path / "out", *options).stdout)
    [change] = [change for change in data["changes"] if change["config"]["type"] == "MixedPrecisionConfig"]
    assert change["config"]["average_bits"] == 4.6
    kinds = {getattr(m, "scheme", None) for m in hf_accel.from_pretrained(tmp_path / "out").model.layers.modules()}
    assert len({kind.bits for kind in kinds if kind is not None}) > 1


def test_training_in_few_bits(folder: Path, tmp_path: Path) -> None:
    options = ("--method", "qat", "--bits", "3", "--minutes", "0.05", "--resume", *OPTIONS, "--json")
    data = json.loads(succeed("quantize", folder, tmp_path / "out", *options).stdout)
    assert data["quality"]["kl"] > 0
    assert data["split"] is None
    found = hf_accel.from_pretrained(tmp_path / "out")
    assert found.model.layers[0].mlp.up_proj.scheme.bits == 3
    assert not (tmp_path / "out.partial").exists()


def test_formats_and_those_that_cannot_hold_the_model(folder: Path, tmp_path: Path) -> None:
    shared = ("quantize", folder, tmp_path, "--dtype", "float32", "--threads", "1", "--head", "0")
    succeed(*shared, "--bits", "4", "--format", "gptq")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    expected = logits(hf_accel.from_pretrained(tmp_path))
    result = run(*shared, "--bits", "3", "--format", "gptq")
    assert result.exit_code == 2
    assert "Nothing is lost" in " ".join(result.stderr.split())
    found = logits(hf_accel.from_pretrained(tmp_path))
    assert found.shape == expected.shape
    assert not torch.equal(found, expected), "it has 3 bits"


def test_without_a_text_the_model_writes_two(folder: Path, tmp_path: Path) -> None:
    shown = succeed("quantize", folder, tmp_path, "--method", "gptq", "--bits", "3", *OPTIONS).stdout
    assert "products solved on" in shown
    assert "tokens of the model's own samples" in shown
    assert "kept back" not in shown


def test_a_run_that_is_interrupted_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = (
        "quantize",
        folder,
        out,
        "--method",
        "gptq",
        "--bits",
        "3",
        *OPTIONS,
        "--calibration",
        folder / "text.txt",
    )
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
    assert torch.equal(logits(hf_accel.from_pretrained(out)), in_memory(GPTQConfig(bits=3, group_size=32), folder)), (
        "the same bits"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (("--method", "magic"), f"--method is one of {', '.join(METHODS)}; 'magic' was given"),
        (("--method", "gptq", "--bits", "5"), "GPTQConfig.bits is 2, 3, 4 or 8; 5 was given"),
        (("--method", "gptq", "--bits", "2.5"), "GPTQConfig.bits is 2, 3, 4 or 8; 2.5 was given"),
        (("--resume",), "--resume belongs to --method gptq, awq, qat; the method is 'nearest'"),
        (("--refine-steps", "3"), "--refine-steps belongs to --method gptq, awq, mixed, qat;"),
        (("--method", "mixed", "--layer", "a=4"), "--layer belongs to --method nearest, gptq, awq, qat;"),
        (("--method", "mixed", "--asymmetric"), "--asymmetric belongs to --method nearest, gptq, awq, qat;"),
        (("--minutes", "3"), "--minutes belongs to --method qat;"),
        (("--method", "qat", "--embeddings"), "--embeddings are not trained in few bits"),
        (("--format", "awq"), "--format is one of compressed-tensors, gptq"),
        (("--method", "gptq", "--refine-steps", "-1"), "refine_steps"),
        (("--method", "gptq", "--calibration", "{short}"), "tells too little"),
    ],
    ids=str,
)
def test_errors_are_one_message(options: tuple[str, ...], words: str, folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abacadae")
    given = (option.format(short=short) for option in options)
    result = run("quantize", folder, tmp_path / "out", *given, "--dtype", "float32")
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
