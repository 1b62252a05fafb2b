"""`hf-accel quantize` writes what the library computes, and refuses in one message; `bench` in few bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, build
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.cli import app
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.ops.affine import Scheme

EIGHT = ("--dtype", "float32", "--threads", "1", "--bits", "8")


@pytest.fixture(autouse=True)
def _offline_and_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved model without a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 23).view(2, 10)).logits


def in_memory(config: WeightOnlyConfig, name: Path | str = "", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(name or demo_path(), dtype=dtype).eval()
    return logits(hf_accel.optimize(model, config))


def test_eight_bits(tmp_path: Path) -> None:
    out = tmp_path / "made" / "on the way"
    data = json.loads(succeed("quantize", demo_path(), out, *EIGHT, "--json").stdout)
    again = hf_accel.from_pretrained(out)
    assert torch.equal(logits(again), in_memory(WeightOnlyConfig(bits=8)))
    assert data["folder"] == str(out)
    assert data["patched_weight_bytes"] == Anatomy.of(again).weight_bytes < data["weight_bytes"] / 2
    assert data["extra_bytes"] == 0
    assert 0 < data["quality"]["kl"] < 0.01
    assert data["quality"]["perplexity_before"] is None
    words = AutoTokenizer.from_pretrained(out)
    ids = again.generate(**words("def add(a, b):", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert words.decode(ids[0])


def test_four_bits_with_some_layers_in_eight_and_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(__file__).read_text()[:3000])
    options = ("--bits", "4", "--group-size", "32", "--layer", "model.layers.0.*=8", "--layer", "*.down_proj=0")
    arguments = ("quantize", demo_path(), tmp_path / "out", *options, "--dtype", "float32", "--threads", "1")
    data = json.loads(succeed(*arguments, "--calibration", text, "--json").stdout)
    config = WeightOnlyConfig(bits=4, group_size=32, layers={"model.layers.0.*": 8, "*.down_proj": None})
    again = hf_accel.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), in_memory(config))
    assert again.model.layers[0].mlp.down_proj.scheme == Scheme(8)
    assert again.model.layers[1].mlp.up_proj.scheme == Scheme(4, 32)
    assert type(again.model.layers[1].mlp.down_proj) is torch.nn.Linear
    quality = data["quality"]
    assert quality["perplexity_after"] == pytest.approx(quality["perplexity_before"], rel=0.2)
    assert quality["source"] == "the text given"


@pytest.mark.parametrize(
    "options, config",
    [
        (("--asymmetric", "--group-size", "64"), WeightOnlyConfig(symmetric=False, group_size=64)),
        (("--head", "0"), WeightOnlyConfig(head=None)),
        (("--bits", "8", "--embeddings"), WeightOnlyConfig(bits=8, embeddings=8)),
    ],
    ids=str,
)
def test_other_options_in_bfloat16(options: tuple[str, ...], config: WeightOnlyConfig, tmp_path: Path) -> None:
    shown = succeed("quantize", demo_path(), tmp_path, *options, "--threads", "1").stdout
    assert "hf_accel report" in shown
    assert "quality: KL" in shown
    assert "load it with hf_accel.from_pretrained" in shown
    again = hf_accel.from_pretrained(tmp_path)
    assert again.dtype is torch.bfloat16
    assert torch.equal(logits(again), in_memory(config, dtype=torch.bfloat16))


def test_a_model_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    succeed("quantize", folder, tmp_path, *EIGHT)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), in_memory(WeightOnlyConfig(bits=8), folder))


def test_the_private_layout(tmp_path: Path) -> None:
    assert TINY["gpt2"].model_type == "gpt2"
    build("gpt2").save_pretrained(tmp_path / "stock")
    succeed("quantize", tmp_path / "stock", tmp_path / "out", *EIGHT)
    expected = in_memory(WeightOnlyConfig(bits=8), tmp_path / "stock")
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "out")), expected)


def test_a_folder_is_quantized_in_its_place(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    succeed("quantize", tmp_path, tmp_path, *EIGHT)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), in_memory(WeightOnlyConfig(bits=8), folder))


@pytest.mark.parametrize(
    "options, words",
    [
        (("{out}", "--bits", "5"), "WeightOnlyConfig.bits is 2, 3, 4 or 8; 5 was given"),
        (("{out}", "--group-size", "48"), "group_size is one of"),
        (("{out}", "--bits", "8", "--asymmetric"), "False only with bits below 8"),
        (("{out}", "--head", "3"), "WeightOnlyConfig.head is 4, 8 or None"),
        (("{file}",), "is a file"),
        (("{out}", "--layer", "model.layers.0.*"), "--layer takes PATTERN=BITS"),
        (("{out}", "--layer", "=8"), "--layer takes PATTERN=BITS"),
        (("{out}", "--layer", "model.layers.0.*=many"), "--layer takes PATTERN=BITS"),
        (("{out}", "--layer", "model.layers.0.*=6"), "is 2, 3, 4 or 8; 6 was given"),
        (("{out}", "--layer", "no.such.*=8"), "'no.such.*' matches no module"),
        (("{out}", "--calibration", "{file}"), "needs the tokenizer"),
        (("{out}", "--calibration", "{missing}"), "does not exist"),
    ],
    ids=str,
)
def test_errors_are_one_message(options: tuple[str, ...], words: str, folder: Path, tmp_path: Path) -> None:
    places = {"out": tmp_path / "out", "file": tmp_path / "file", "missing": tmp_path / "missing"}
    places["file"].write_text("some text")
    result = run("quantize", folder, *(option.format(**places) for option in options), "--dtype", "float32")
    assert result.exit_code == 2
    # typer frames its own messages
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not places["out"].exists()
    assert places["file"].read_text() == "some text"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xfa not utf-8"])
def test_a_calibration_file_without_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    result = run("quantize", demo_path(), tmp_path / "out", *EIGHT, "--calibration", tmp_path / "text")
    assert result.exit_code == 2
    assert "ConfigError" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run("quantize", "no/such-model", tmp_path / "out")
    assert result.exit_code == 2
    assert "'no/such-model' is not a shape" in " ".join(result.stderr.split())


def test_help() -> None:
    assert "quantize" in succeed("--help").stdout
    assert "--bits" in succeed("quantize", "--help").stdout


BENCH = ("--dtype", "float32", "--prompt", "8", "--new", "4", "--rounds", "2", "--threads", "1")


def test_bench_in_few_bits() -> None:
    data = json.loads(succeed("bench", demo_path(), *BENCH, "--bits", "4", "--group-size", "32", "--json").stdout)
    report = data["report"]
    [change] = [change for change in report["changes"] if change["config"]["type"] == "WeightOnlyConfig"]
    assert change["fidelity"] == "lossy"
    assert change["config"]["group_size"] == 32
    assert report["patched_weight_bytes"] < 0.4 * report["weight_bytes"]
    assert "DecodingConfig" in {change["config"]["type"] for change in report["changes"]}
    assert isinstance(data["same_ids"], bool)


@pytest.mark.parametrize(
    "options, words", [(("--bits", "5"), "is 2, 3, 4 or 8; 5 was given"), (("--group-size", "32"), "belongs to --bits")]
)
def test_bench_refuses(options: tuple[str, ...], words: str) -> None:
    result = run("bench", demo_path(), *BENCH, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize("out", ["file/sub", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_written_is_found_out_first(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hf_accel.cli.quantize.load_model", lambda *_: pytest.fail("loaded before it was tried"))
    result = run("quantize", demo_path(), str(tmp_path / out))
    assert result.exit_code == 2
    assert "OUT cannot be written" in " ".join(result.stderr.split())
