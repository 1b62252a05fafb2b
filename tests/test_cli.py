"""The command line: output for people and for programs, exit codes, errors as one message."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

import hf_accel
from hf_accel.assets import demo_path
from hf_accel.cli import app
from hf_accel.core.steps.plan import Plan
from hf_accel.decoding import choosing
from hf_accel.kernels import native
from hf_accel.measure import Bench, Run, difference
from hf_accel.measure.overhead import CallCost
from hf_accel.measure.result import Sample, Side
from hf_accel.speculative.statistics import Statistics

BENCH = ("--dtype", "float32", "--prompt", "12", "--new", "6", "--rounds", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _offline_and_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved model in fp32."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def test_version() -> None:
    assert succeed("--version").stdout.strip() == f"hf-accel {hf_accel.__version__}"


def test_help_names_every_command() -> None:
    shown = succeed("--help").stdout
    assert all(command in shown for command in ("demo", "plan", "bench", "doctor"))


@pytest.mark.parametrize("command", ["demo", "plan", "bench", "doctor"])
def test_help_of_a_command(command: str) -> None:
    assert "--json" in succeed(command, "--help").stdout


def test_doctor_says_what_is_there_and_what_to_do() -> None:
    found = json.loads(succeed("doctor", "--json", "--threads", "1").stdout)
    assert found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["read_bandwidth_bytes_per_s"] > 1e8
    assert found["native"]["available"] == native.is_available()
    assert found["native"]["isa"] == native.status().isa
    assert found["topology"]["threads"] == found["threads"]["threads"] == 1
    assert found["threads"]["products"]["1"] > 1e7
    assert (found["large_pages"]["trial"] is None) == (found["large_pages"]["obstacle"] is not None)
    text = succeed("doctor", "--threads", "1").stdout
    assert all("".join(advice.split()) in "".join(text.split()) for advice in found["advice"] if " x " not in advice)
    for extra, packages in found["extras"].items():
        # rich wraps lines, so the pip line is compared without white space
        offers = f"pipinstall'hf-accel[{extra}]'" in "".join(text.split())
        assert offers == (None in packages.values())


def test_doctor_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.NativeStatus(False, "the library was not built: install gcc [or clang]", "none", "none", None)
    monkeypatch.setattr(native, "status", lambda: missing)
    text = " ".join(succeed("doctor", "--threads", "1").stdout.split())
    assert "not in use" in text
    assert "install gcc [or clang]" in text


def test_plan_is_shown_and_can_be_read_back(folder: Path) -> None:
    shown = succeed("plan", folder, "--dtype", "float32", "--threads", "1").stdout
    assert "plan for goal exact" in shown
    data = json.loads(succeed("plan", folder, "--dtype", "float32", "--threads", "1", "--json").stdout)
    decided = {step["config"]["type"] for step in data["steps"]} | {skip["what"] for skip in data["skipped"]}
    assert decided >= {"KVCacheConfig", "DecodingConfig", "SharedProjectionConfig"}
    assert Plan.from_dict(data).goal == "exact"


def test_bench_measures_both_and_compares_the_tokens(folder: Path) -> None:
    data = json.loads(succeed("bench", folder, *BENCH, "--json").stdout)
    assert data["same_ids"] is True
    assert data["difference"] is None
    assert data["rounds"] == 2
    model = LlamaForCausalLM.from_pretrained(folder)
    weight_bytes = sum(p.numel() * 4 for p in model.parameters())
    read_bytes = weight_bytes - model.get_input_embeddings().weight.numel() * 4  # a token reads one row of the table
    assert data["weight_bytes"] == weight_bytes
    for side in (data["stock"], data["patched"]):
        assert 0 < side["token_ms"] < side["whole_ms"]
        assert side["whole_ms"] == pytest.approx(side["prefill_ms"] + 5 * side["token_ms"], rel=0.5)
        assert 0 < side["fixed_ms"] < side["one_token_call_ms"]
        assert side["resident_bytes"] is None or side["resident_bytes"] > weight_bytes
        assert side["tokens_per_s"] == pytest.approx(1e3 / side["token_ms"])
        assert side["achieved_bytes_per_s"] == pytest.approx(read_bytes * side["tokens_per_s"])
        assert side["share_of_bandwidth"] * data["read_bandwidth_bytes_per_s"] == pytest.approx(
            side["achieved_bytes_per_s"]
        )
    assert data["ratio"]["token"] == pytest.approx(data["stock"]["token_ms"] / data["patched"]["token_ms"])
    assert data["machine"]["threads"] == 1
    assert {"python", "torch", "transformers", "hf_accel"} == data["versions"].keys()


def test_bench_for_people(folder: Path) -> None:
    shown = succeed("bench", folder, *BENCH, "--batch", "3", "--left-padding").stdout
    assert "The generated tokens are the same." in shown
    assert "decode, ms per token" in shown
    assert "left padding" in " ".join(shown.split())
    assert "hf_accel report" in shown


def test_bench_samples_the_same_draws(folder: Path) -> None:
    options = ("--sample", "--top-k", "20", "--top-p", "0.9", "--temperature", "1.3", "--batch", "2")
    data = json.loads(succeed("bench", folder, *BENCH, *options, "--json").stdout)
    assert data["same_ids"] is True
    assert data["workload"]["samples"] is True
    assert (data["workload"]["top_k"], data["workload"]["top_p"], data["workload"]["temperature"]) == (20, 0.9, 1.3)


def test_bench_builds_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
            "tie_word_embeddings": True}  # fmt: skip
    monkeypatch.setitem(hf_accel.measure.subjects.shapes.SHAPES, "tiny", tiny)
    data = json.loads(succeed("bench", "tiny", *BENCH[2:], "--json").stdout)
    assert (data["model"], data["dtype"]) == ("tiny", "bfloat16")


def test_bench_shows_a_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = choosing.choose_token

    def second_best(scores: torch.Tensor, samples: bool) -> torch.Tensor:
        return choose(scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf), samples)

    from hf_accel.cli import models

    plan = Plan.of([hf_accel.DecodingConfig()])
    monkeypatch.setattr(models, "plan_goal", lambda *_: plan)
    monkeypatch.setattr(choosing, "choose_token", second_best)
    data = json.loads(succeed("bench", folder, *BENCH, "--json").stdout)
    assert data["same_ids"] is False
    assert (data["difference"]["row"], data["difference"]["new_token"]) == (0, 0)
    assert data["difference"]["margin"] > 0
    assert "The generated tokens differ." in succeed("bench", folder, *BENCH).stdout


def speculation_of(data: dict) -> tuple[dict, dict]:
    """The config that was applied and the counts."""
    [config] = [c["config"] for c in data["report"]["changes"] if c["config"]["type"] == "SpeculativeConfig"]
    return config, data["report"]["speculation"]


@pytest.mark.parametrize("drafter", ["lookup", "self", "layer_skip", "auto"])
def test_bench_speculates_beside_the_exact_steps(drafter: str) -> None:
    data = json.loads(succeed("bench", demo_path(), *BENCH, "--speculative", drafter, "--json").stdout)
    config, counts = speculation_of(data)
    assert config["drafter"] == drafter
    assert data["same_ids"] is True
    assert counts["calls"] > 0
    assert counts["tokens_per_step"] >= 1
    applied = {change["config"]["type"] for change in data["report"]["changes"]}
    assert {"KVCacheConfig", "DecodingConfig"} <= applied


def test_bench_drafts_with_another_model() -> None:
    options = ("--speculative", "model", "--draft-model", demo_path())
    data = json.loads(succeed("bench", demo_path(), *BENCH, *options, "--json").stdout)
    config, counts = speculation_of(data)
    assert config["drafter"] == "model"
    assert data["same_ids"] is True
    assert counts["calls"] > 0
    data = json.loads(succeed("bench", demo_path(), *BENCH, "--speculative", "auto", *options[2:], "--json").stdout)
    assert speculation_of(data)[0]["drafter"] == "auto"


def test_a_goal_beside_bits_is_planned(folder: Path) -> None:
    shown = succeed("plan", folder, "--dtype", "float32", "--threads", "1", "--bits", "4", "--group-size", "32").stdout
    assert "plan for goal exact beside WeightOnlyConfig" in shown
    assert "weights afterwards" in shown
    assert "with WeightOnlyConfig alone ->" in " ".join(shown.split())
    data = json.loads(succeed("bench", folder, *BENCH, "--bits", "8", "--json").stdout)
    assert data["report"]["named"] == ["WeightOnlyConfig"]
    assert "DecodingConfig" in {change["config"]["type"] for change in data["report"]["changes"]}


def test_bench_speculates_in_few_bits(folder: Path) -> None:
    data = json.loads(succeed("bench", folder, *BENCH, "--bits", "8", "--speculative", "lookup", "--json").stdout)
    assert speculation_of(data)[0]["drafter"] == "lookup"
    assert "WeightOnlyConfig" in {change["config"]["type"] for change in data["report"]["changes"]}


def test_bench_of_speculation_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    # drafts in every step, so that some are accepted whatever the machine is busy with
    always = partial(hf_accel.SpeculativeConfig, adaptive=False)
    monkeypatch.setattr("hf_accel.cli.bench.SpeculativeConfig", always)
    shown = succeed("bench", demo_path(), *BENCH, "--new", "24", "--speculative", "self").stdout
    assert "The generated tokens are the same." in shown
    assert "tokens per step; self" in shown
    assert "median token" not in shown  # several at once, most of them in no time
    [rate] = [line for line in shown.splitlines() if "share of bandwidth" in line]
    assert rate.count("%") == 1


def test_tokens_that_arrive_together_are_no_disturbance() -> None:
    def side(seconds: list[float]) -> Side:
        side = Side()
        for _ in range(3):
            side.add(Sample(Run(prefill_s=0.5, tokens_s=seconds, ids=torch.zeros(1, 7)), [CallCost(0.2, 0.1)], None))
        return side

    def is_disturbed(accepted: int | None) -> bool:
        counts = None if accepted is None else Statistics()
        if counts is not None:
            counts.drafted("lookup", 4, accepted)
        result: Any = Bench.__new__(Bench)
        result.report = SimpleNamespace(speculation=counts)
        result.stock, result.patched = side([0.1] * 6), together
        return bool(result.is_disturbed)

    together = side([0.2, 1e-5, 1e-5, 0.2, 1e-5, 1e-5])
    assert together.is_disturbed
    assert not is_disturbed(accepted=2)
    assert is_disturbed(accepted=0)
    assert is_disturbed(accepted=None)


@pytest.mark.parametrize("as_json", [False, True])
def test_demo_writes_the_same_text(as_json: bool) -> None:
    arguments = ["demo", "--new-tokens", "12", "--rounds", "2", "--threads", "1", "--prompt", "def add(a, b):"]
    result = succeed(*arguments, *(["--json"] if as_json else []))
    if as_json:
        data = json.loads(result.stdout)
        assert data["same_ids"] is True
        assert data["stock_text"] == data["patched_text"] != ""
        assert data["prompt"] == "def add(a, b):"
        assert data["report"]["calls"]["served"] + data["report"]["calls"]["delegated"] > 0
    else:
        assert "The same text: all 12 tokens are equal." in result.stdout
        assert "hf_accel report" in result.stdout


def test_demo_shows_a_difference_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = difference.Difference(row=0, new_token=3, stock_id=1, patched_id=2, margin=0.5, rounding=1e-6)
    monkeypatch.setattr("hf_accel.measure.bench.explain", lambda *_, **__: found)
    result = run("demo", "--new-tokens", "4", "--rounds", "2", "--threads", "1")
    assert result.exit_code == 1
    assert "stock wrote" in result.stdout
    assert "optimised wrote" in result.stdout
    assert "The texts differ. row 0, new token 4" in result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("bench", "no/such-model"), "'no/such-model' is not a shape"),
        (("plan", "{folder}", "--goal", "warp"), "There is no goal called 'warp'"),
        (("plan", "{folder}", "--goal", "warp", "--bits", "4"), "There is no goal called 'warp'"),
        (("plan", "{folder}", "--group-size", "32"), "--group-size belongs to --bits"),
        (("bench", "{folder}", "--group-size", "32"), "--group-size belongs to --bits"),
        (("plan", "{folder}", "--bits", "5"), "bits is 2, 3, 4 or 8; 5 was given"),
        (("bench", "{folder}", "--left-padding"), "give a batch of at least 2"),
        (("bench", "{folder}", "--top-k", "5"), "belong to sampling"),
        (("bench", "{folder}", "--speculative", "oracle"), "'oracle' was given"),
        (("bench", "{folder}", "--speculative", "layer_skip"), "the model has only 2 layers"),
        (("bench", "{folder}", "--speculative", "model"), "give --draft-model as well"),
        (("bench", "{folder}", "--draft-model", "{folder}"), "belongs to --speculative model or auto"),
        (("bench", "{folder}", "--speculative", "model", "--draft-model", "{demo}"), "a vocabulary of 1536 tokens"),
        (("bench", "{folder}", "--bits", "4", "--packed"), "--packed belongs to a shape"),
        (("bench", "llama-1b", "--packed"), "MXFP4 is for experts, in groups of 32; the shape 'llama-1b' has none"),
        (("bench", "llama-1b", "--packed", "--bits", "4", "--device", "cuda"), "--packed builds on the CPU"),
        (("bench", "{folder}", "--layers", "1"), "--layers belongs to a shape"),
        (("bench", "llama-1b", "--layers", "17"), "has 16 layers; give 1 to 16"),
        (("demo", "--new-tokens", "100000"), "has room for"),
        (("bench", "{t5}"), "no causal language model could be loaded"),
    ],
)
def test_errors_are_one_message(
    arguments: tuple[str, ...], words: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    if "{t5}" in arguments:
        config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    result = run(*(argument.format(folder=folder, t5=tmp_path, demo=demo_path()) for argument in arguments))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    "config",
    ["[]", "{", "{}", '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "llama", '
     '"rope_parameters": 7}', '{"model_type": "llama", "vocab_size": null}', '{"a": ' + "[" * 50000],
)  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_folders_with_a_damaged_config(command: str, config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    result = run(command, tmp_path, *([tmp_path / "out"] if command == "quantize" else []))
    assert result.exit_code == 2, result.exception
    assert "no causal language model could be loaded" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_unknown_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.cli.doctor.examine", lambda: 1 / 0)
    assert isinstance(run("doctor").exception, ZeroDivisionError)


def test_wrong_options_are_refused() -> None:
    assert run("bench", "llama-1b", "--new", "1").exit_code == 2
    assert run("bench", "llama-1b", "--dtype", "int3").exit_code == 2


def test_time_per_token_counts_every_token() -> None:
    def side(seconds: list[float]) -> Side:
        side = Side()
        for _ in range(3):
            run = Run(prefill_s=0.5, tokens_s=seconds, ids=torch.zeros(1, 5))
            side.add(Sample(run, [CallCost(0.2, 0.1)], None))
        return side

    quiet, interrupted = side([0.1] * 5), side([0.1, 0.1, 0.1, 0.4, 0.4])
    assert interrupted.token.median == pytest.approx(0.22)
    assert interrupted.median_token.median == pytest.approx(0.1)
    assert interrupted.whole.median == pytest.approx(1.6)
    assert interrupted.is_disturbed
    assert not quiet.is_disturbed


def test_first_difference_is_the_earliest() -> None:
    stock = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    patched = torch.tensor([[1, 2, 3, 9], [1, 2, 9, 4]])
    assert difference.first_difference(stock, stock, 1) is None
    assert difference.first_difference(stock, patched, 1) == (1, 1)
    assert difference.first_difference(stock, stock[:, :3], 1) == (0, 2)
