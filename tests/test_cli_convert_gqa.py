"""`hf-accel convert-gqa` writes an ordinary checkpoint, says what it cost, previews, and refuses in one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heads
import pytest
import torch
from models import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_accel.assets import demo_path
from hf_accel.cli import app
from hf_accel.cli import convert_gqa as command
from hf_accel.gqa import convert_gqa

ONE = ("--kv-heads", "1", "--dtype", "float32", "--threads", "1")
FEW = (*ONE, "--repair-steps", "4")


@pytest.fixture(autouse=True)
def _offline_and_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert-gqa", *(str(argument) for argument in arguments)])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def text(folder: Path) -> Path:
    """Write some 4,000 tokens of code."""
    path = folder / "text.py"
    path.write_text("".join(p.read_text() for p in sorted(Path(__file__).parent.glob("test_c*.py")))[:11000])
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 23).view(2, 10)).logits


def test_a_checkpoint_that_transformers_loads_and_what_it_cost(tmp_path: Path) -> None:
    out = tmp_path / "made" / "on the way"
    data = json.loads(succeed(demo_path(), out, *FEW, "--calibration", text(tmp_path), "--json").stdout)
    assert (data["kv_heads_before"], data["kv_heads"]) == (2, 1)
    # 5 layers, keys and values, 32 numbers of 4 bytes for each head
    assert (data["cache_bytes_before"], data["cache_bytes"]) == (2 * 5 * 2 * 32 * 4, 5 * 2 * 32 * 4)
    assert data["folder"] == str(out)
    assert data["seconds"] > 0
    quality = data["quality"]
    assert 0 < quality["kl"] < 0.4
    assert quality["source"] == "the text given"
    assert quality["perplexity_after"] == pytest.approx(quality["perplexity_before"], rel=0.3)
    assert quality["tokens"] < 1500, "measured on what was kept back"
    model = AutoModelForCausalLM.from_pretrained(out)
    original = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    assert model.config.num_key_value_heads == 1
    assert model.dtype is torch.float32
    assert model.generation_config.eos_token_id == original.generation_config.eos_token_id
    words = AutoTokenizer.from_pretrained(out)
    ids = words("def add(a, b):", return_tensors="pt", return_token_type_ids=False)
    assert words.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0]).startswith("def add(a, b):")
    difference = (logits(model) - logits(original)).norm() / logits(original).norm()
    assert 0.001 < difference < 0.5


@pytest.mark.parametrize("method", ["mean", "first"])
def test_methods_without_text(method: str, tmp_path: Path) -> None:
    shown = succeed(demo_path(), tmp_path, *ONE, "--method", method).stdout
    assert "the model's own samples" in shown
    assert "perplexity" not in shown, "of the model's own text it says nothing"
    original = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    expected = convert_gqa(original, 1, method=method)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(expected))


def test_another_architecture_without_a_tokenizer(tmp_path: Path) -> None:
    heads.made("neox_parallel").save_pretrained(tmp_path / "stock")
    refused = run(tmp_path / "stock", tmp_path / "out", *ONE, "--method", "mean")
    assert refused.exit_code == 2
    assert "Express it in another architecture first: phi" in " ".join(refused.stderr.split())
    shown = succeed(tmp_path / "stock", tmp_path / "out", *ONE, "--method", "mean", "--architecture", "phi").stdout
    assert "PhiForCausalLM" in shown
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.model_type, config.num_key_value_heads) == ("phi", 1)


def test_a_preview_writes_nothing(tmp_path: Path) -> None:
    options = (*ONE, "--calibration", text(tmp_path), "--preview")
    shown = succeed(demo_path(), *options, "--repair-steps", "0").stdout
    assert "now 2, 2560 bytes of cache per token" in shown
    assert "1: KL" in shown
    assert "KL of each layer alone at 1" in shown
    data = json.loads(succeed(demo_path(), tmp_path / "out", *options, "--method", "mean", "--json").stdout)
    [preview] = data["previews"]
    assert [ratio["kv_heads"] for ratio in preview["ratios"]] == [1]
    assert len(preview["ratios"][0]["layers"]) == 5
    assert not (tmp_path / "out").exists()


def test_a_preview_of_a_method_that_needs_no_text_takes_any(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def f(x):\n    return x\n")
    options = ("--method", "first", "--preview", "--calibration", tmp_path / "text")
    assert "1: KL" in succeed(demo_path(), *ONE, *options).stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (("{out}", "--kv-heads", "0"), "num_kv_heads is"),
        (("{out}", "--kv-heads", "3"), "3 key/value heads were asked for, and the model has 2; ask for fewer"),
        (("{out}", "--kv-heads", "1", "--method", "median"), "one of aligned, mean, first"),
        (("{out}", "--kv-heads", "1", "--repair-steps", "-1"), "repair_steps is"),
        (("{out}", "--kv-heads", "1", "--architecture", "phi"), "cannot be expressed as phi"),
        (("{out}", "--kv-heads", "1", "--calibration", "{file}"), "needs the tokenizer"),
        (("{out}", "--kv-heads", "1", "--calibration", "{bytes}"), "takes a text in UTF-8"),
        (("{out}", "--kv-heads", "1", "--calibration", "{out}"), "does not exist"),
        (("{full}", "--kv-heads", "1"), "OUT is not empty"),
        (("{file}", "--kv-heads", "1"), "is a file"),
        (("{file}/sub", "--kv-heads", "1"), "OUT cannot be written"),
        (("--kv-heads", "1"), "OUT is missing"),
        (("{out}",), "Missing option '--kv-heads'"),
    ],
    ids=str,
)
def test_errors_are_one_message(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "tiny")
    (tmp_path / "full").mkdir()
    for name, content in (("full/letter", b"dear"), ("file", b"some text"), ("bytes", b"\xff\xfe\xfa")):
        (tmp_path / name).write_bytes(content)
    places = {name: str(tmp_path / name) for name in ("full", "file", "bytes", "out")}
    result = run(tmp_path / "tiny", *(option.format(**places) for option in options))
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter"]


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def f(x):\n    return x\n" * 9)
    result = run(demo_path(), tmp_path / "out", *FEW, "--calibration", tmp_path / "text")
    assert result.exit_code == 2
    assert "Give more text" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_full_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letter").write_text("dear")
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("loaded before it was tried"))
    result = run(demo_path(), tmp_path, *ONE)
    assert result.exit_code == 2
    assert "OUT is not empty" in " ".join(result.stderr.split())
