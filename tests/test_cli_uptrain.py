"""`hf-accel uptrain` writes an ordinary model, takes up a run that was interrupted, and overwrites nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_accel.assets import demo_path
from hf_accel.cli import app
from hf_accel.recipes import trainer

OPTIONS = ("--steps", "3", "--window", "32", "--batch-size", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _offline_and_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def student(folder: Path) -> Path:
    """Save the demo model with other keys."""
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(0.5)
    model.save_pretrained(folder / "student")
    return folder / "student"


def text(folder: Path) -> Path:
    (folder / "texts" / "more").mkdir(parents=True)
    (folder / "texts" / "one.py").write_text(Path(__file__).read_text()[:1500])
    (folder / "texts" / "more" / "two.py").write_text("print('two')\n" * 20)
    (folder / "texts" / "bytes").write_bytes(b"\xff\xfe\xfa")
    return folder / "texts"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["uptrain", *(str(argument) for argument in arguments)])


def test_a_run_is_interrupted_taken_up_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (student(tmp_path), demo_path(), tmp_path / "out", "--text", text(tmp_path), *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Conductor, "on_train_end", lambda *_, **__: 1 / 0)
        assert isinstance(run(*arguments).exception, ZeroDivisionError)
    assert (tmp_path / "out" / "training" / "checkpoint-3").is_dir()
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    data = json.loads(result.stdout)
    assert data["resumed_at"] == 3
    assert data["after"]["kl"] < data["before"]["kl"]
    assert data["folder"] == str(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("def")["input_ids"]
    assert {path.name for path in (tmp_path / "out" / "training").iterdir()} >= {"curve.jsonl", "uptrain.json"}
    assert not list((tmp_path / "out" / "training").glob("checkpoint-*"))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = run(*arguments)
    assert again.exit_code == 2
    assert "OUT has a model already" in " ".join(again.stderr.split())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_the_teacher_writes_the_text_where_none_is_given(tmp_path: Path) -> None:
    result = run(student(tmp_path), demo_path(), tmp_path / "out", *OPTIONS, "--lora-rank", "2")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "LoRA of rank 2" in result.stdout
    assert "the teacher's own text" in result.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (("{tiny}", "{tiny}", "{out}", "--text", "{file}"), "needs a tokenizer"),
        (("{demo}", "{demo}", "{full}"), "neither empty nor of an interrupted run"),
        (("{demo}", "{demo}", "{out}", "--text", "{bytes}"), "takes texts in UTF-8"),
        (("{demo}", "{demo}", "{out}", "--text", "{empty}"), "There is no text in"),
        (("{demo}", "{demo}", "{out}", "--text", "{out}"), "does not exist"),
        (("{demo}", "{demo}", "{out}", "--minutes", "1"), "Give one of minutes, tokens and steps"),
        (("{demo}", "{tiny}", "{out}"), "vocabulary"),
        (("{demo}", "no/such-model", "{out}"), "is not a shape"),
    ],
    ids=str,
)
def test_errors_are_one_message(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    for name, content in (("file", b"some text"), ("bytes", b"\xff\xfe\xfa"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    names = ("tiny", "full", "file", "bytes", "empty", "out")
    places = {name: str(tmp_path / name) for name in names} | {"demo": str(demo_path())}
    result = run(*(option.format(**places) for option in options), *OPTIONS)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert not (tmp_path / "out" / "config.json").exists()
