"""Uptraining: the loss is the textbook's, an interrupted run ends with the same bits, nobody's model is disturbed."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, prompt
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.errors import CheckpointError, ConfigError, ConflictError, MissingDependencyError, UnsupportedModelError
from hf_accel.measure.quality import QualityReference
from hf_accel.measure.text import calibration_text
from hf_accel.recipes import uptrain
from hf_accel.recipes.distillation import divergence, hidden_state_loss
from hf_accel.recipes.evaluation import compare
from hf_accel.recipes.pacing import Clock, Pace, Schedule
from hf_accel.recipes.trainer import Objective

IDS = prompt(30, 16)
SHORT: dict[str, Any] = {"window": 16, "batch_size": 4, "bf16": False, "evaluations": 1, "picture": False}


def changed(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose keys and values are not what they were."""
    model = build(name, dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in ("k_proj", "v_proj", "c_attn")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Interruption(TrainerCallback):
    """Presses control C in the middle of a step."""

    def __init__(self, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.after, self.error = after, error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise self.error


# the loss


@pytest.mark.parametrize("temperature, share", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (3.0, 1.0)])
@pytest.mark.parametrize("vocabulary", [11, 1 << 18])
def test_the_divergence_equals_a_textbook(temperature: float, share: float, vocabulary: int) -> None:
    torch.manual_seed(1)
    ours = torch.randn(2, 3, vocabulary, requires_grad=True)
    theirs, ids = 2 * torch.randn(2, 3, vocabulary), torch.randint(vocabulary, (2, 3))
    p = torch.softmax(theirs.double() / temperature, -1)
    q = torch.softmax(ours.double() / temperature, -1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    hard = nn.functional.cross_entropy(ours[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    expected = (1 - share) * temperature**2 * kl + share * hard
    [slope] = torch.autograd.grad(expected, ours)
    found = divergence(ours, theirs.clone(), ids, temperature, share)
    (0.5 * found).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(2 * ours.grad, slope.float(), rtol=1e-4, atol=1e-8)


def test_words_that_a_teacher_forbids_count_for_nothing() -> None:
    theirs = torch.randn(1, 2, 5)
    theirs[..., 3] = -math.inf
    ours = torch.zeros(1, 2, 5, requires_grad=True)
    loss = divergence(ours, theirs, torch.zeros(1, 2, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert ours.grad.isfinite().all()


def test_the_hidden_state_loss_equals_a_textbook() -> None:
    torch.manual_seed(1)
    ours, theirs = (tuple(torch.randn(4, 2, 3, 6)) for _ in range(2))
    expected = sum(float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(ours[1:], theirs[1:])) / 3
    assert hidden_state_loss(ours, theirs) == pytest.approx(expected, rel=1e-5)
    model, other = build("llama"), changed("llama")
    plain, both = (Objective(hidden_weight=weight)(other, model, IDS[:2], False) for weight in (0.0, 2.0))
    plain, both = plain.detach(), both.detach()
    states = [each(IDS[:2], output_hidden_states=True).hidden_states for each in (other, model)]
    assert float(both - plain) == pytest.approx(2 * float(hidden_state_loss(*states).detach()), rel=1e-4)


def test_measuring_agrees_with_what_measures_quality_elsewhere() -> None:
    teacher, student = build("llama"), changed("llama")
    reference = QualityReference(teacher, calibration_text(teacher, IDS))
    reference.model = student.train()
    expected = reference.compare()
    found, used = compare(student, teacher, IDS, "the text given", False, batch=7)
    assert used == len(IDS)
    assert student.training
    for name in ("kl", "top1_agreement", "perplexity_before", "perplexity_after", "tokens"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4)


# a run


def test_a_few_steps_heal_the_demo_model(tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.v_proj.weight.view(2, 32, -1)[:] = layer.self_attn.v_proj.weight.view(2, 32, -1).mean(0)
    text = Path(argparse.__file__).read_text()
    before = bits(teacher)
    result = uptrain(
        student, teacher, [text[:40000]], tokenizer=tokenizer, held_out=text[60000:64000], steps=15, batch_size=4,
        window=128, bf16=False, out=tmp_path, evaluations=2, picture=False,
    )  # fmt: skip
    assert result.after.kl < 0.7 * result.before.kl
    assert result.after.perplexity_after < result.before.perplexity_after
    assert_same_bits(bits(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert result.student is student
    assert not student.training
    assert result.tokens == 15 * 4 * 128
    assert result.extra_bytes > 12 * result.trained_parameters
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert lines == list(result.curve)
    assert [line["step"] for line in lines if "kl" in line] == [0, 5, 10, 15]
    assert lines[-1]["kl"] == result.after.kl
    assert {line["step"] for line in lines if "loss" in line} == set(range(1, 16))
    assert json.loads((tmp_path / "uptrain.json").read_text())["result"] == json.loads(json.dumps(result.to_dict()))
    assert "KL to the teacher" in str(result)


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gpt2", marks=pytest.mark.slow)])  # tied; dropout
def test_an_interrupted_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    options = SHORT | {"steps": 9, "checkpoint_minutes": 0, "seed": 3}  # 29 windows: the second pass begins on the way
    whole = changed(name)
    uptrain(whole, build(name), IDS, **options)
    student = changed(name)
    for after in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            uptrain(student, build(name), IDS, out=tmp_path, callbacks=[Interruption(after)], **options)
        student = changed(name)
    result = uptrain(student, build(name), IDS, out=tmp_path, **options)
    assert result.resumed_at == 4
    assert_same_bits(bits(student), bits(whole))
    assert [record["step"] for record in result.curve if "loss" in record] == list(range(1, 10))
    again = changed(name)
    assert uptrain(again, build(name), IDS, out=tmp_path, **options).resumed_at == 9
    assert_same_bits(bits(again), bits(whole))


@pytest.mark.peft
def test_low_rank_additions_are_merged_and_can_be_interrupted(tmp_path: Path) -> None:
    before: list[torch.Tensor] = []

    class Last(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            before.append(model.eval()(IDS[:2]).logits.detach())

    options = SHORT | {"steps": 8, "lora_rank": 4, "learning_rate": 1e-2, "held_out": IDS}
    student, teacher = changed("llama"), build("llama")
    names = list(bits(student))
    result = uptrain(student, teacher, IDS, callbacks=[Last()], **options)
    assert list(bits(student)) == names
    assert {type(module) for module in student.modules()} == {type(module) for module in teacher.modules()}
    assert vars(student).keys() == vars(changed("llama")).keys()
    assert all(parameter.requires_grad for parameter in student.parameters())
    torch.testing.assert_close(student(IDS[:2]).logits, before[0], rtol=1e-3, atol=1e-3)
    assert result.after.kl < result.before.kl
    assert result.trained_parameters < sum(parameter.numel() for parameter in student.parameters()) / 2

    resumed = changed("llama")
    options["checkpoint_minutes"] = 0
    with pytest.raises(KeyboardInterrupt):
        uptrain(resumed, teacher, IDS, out=tmp_path, callbacks=[Interruption(3)], **options)
    assert_same_bits(bits(resumed), bits(changed("llama")))
    assert uptrain(resumed, teacher, IDS, out=tmp_path, **options).resumed_at == 3
    assert_same_bits(bits(resumed), bits(student))


def test_what_is_shared_with_the_teacher_is_copied() -> None:
    teacher, student = build("qwen2"), changed("qwen2")
    before = bits(teacher)
    student.model.embed_tokens.weight = student.lm_head.weight = teacher.model.embed_tokens.weight  # the same object
    ours, theirs = student.model.layers[0].mlp, teacher.model.layers[0].mlp
    ours.up_proj.weight.data, ours.gate_proj.weight.data = theirs.up_proj.weight.data, theirs.gate_proj.weight.data
    expected = sum(4 * weight.numel() for weight in (teacher.lm_head.weight, ours.up_proj.weight, ours.up_proj.weight))
    result = uptrain(student, teacher, IDS, steps=2, learning_rate=0.1, **SHORT)
    assert result.copied_bytes == expected
    assert_same_bits(bits(teacher), before)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    student.model.layers[0] = teacher.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="the very same module"):
        uptrain(student, teacher, IDS, steps=2, **SHORT)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_modes_flags_types_and_config_are_put_back(error: type[BaseException] | None, tmp_path: Path) -> None:
    student, teacher = changed("llama", torch.bfloat16), build("llama").train()
    student.train()
    student.model.layers[0].eval()
    student.model.norm.weight.requires_grad_(False)
    frozen = student.model.norm.weight.clone()
    gradient = teacher.model.norm.weight.grad = torch.ones(52)
    modes = [[module.training for module in model.modules()] for model in (student, teacher)]
    config, state, attributes = student.config.to_dict(), torch.get_rng_state(), vars(student).keys() | set()

    def go() -> None:
        calls = [Interruption(2, error)] if error else []
        uptrain(student, teacher, IDS, steps=3, out=tmp_path, checkpoint_minutes=0, callbacks=calls, **SHORT)  # type: ignore[arg-type]

    if error:
        with pytest.raises(error):
            go()
        assert (tmp_path / "checkpoint-2").is_dir()
    else:
        go()
        assert any(
            not torch.equal(a, b) for a, b in zip(student.parameters(), changed("llama", torch.bfloat16).parameters())
        )
    assert [[module.training for module in model.modules()] for model in (student, teacher)] == modes
    assert [parameter.requires_grad for parameter in student.parameters()].count(False) == 1
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is None for parameter in student.parameters())
    assert teacher.model.norm.weight.grad is gradient
    assert torch.equal(student.model.norm.weight, frozen)
    assert student.config.to_dict() == config
    assert vars(student).keys() == attributes
    assert torch.equal(torch.get_rng_state(), state)


def test_minutes_bound_a_run_whose_rate_falls_to_zero() -> None:
    result = uptrain(changed("llama"), build("llama"), None, minutes=0.06, **{**SHORT, "bf16": None})
    assert result.steps > 1
    assert result.curve[-1]["step"] == result.steps
    rates = [record["learning_rate"] for record in result.curve if "learning_rate" in record]
    assert rates[-1] < 0.1 * max(rates)
    assert result.after.source == "the teacher's own text"
    assert result.after.perplexity_after is None


def test_the_pace_moves_the_end_to_where_the_time_is_up() -> None:
    clock = Clock(minutes=10)
    pace, schedule = Pace(clock, step_s=1.0, evaluation_s=10.0), Schedule.of(500, "cosine")
    assert 500 < pace.affordable(1) < 590
    assert not pace.corrected(schedule, 1, 7)  # near enough
    before = [schedule(step) for step in range(100)]
    pace.saw(3.0, 1.0)
    assert pace.corrected(schedule, 100, 1)
    assert 250 < schedule.steps < 300
    assert [schedule(step) for step in range(100)] == pytest.approx(before)
    rates = [schedule(step) for step in range(schedule.steps)]
    assert max(rates) <= 1
    assert rates[-1] < 1e-3
    assert all(a >= b for a, b in zip(rates[20:], rates[21:]))
    pace.saw(0.5, 1.0)
    assert pace.corrected(schedule, 200, 1)
    assert schedule.steps > 1000
    assert not Pace(Clock(None), 1.0, 1.0).corrected(schedule, 200, 1)
    assert Schedule.of(10, "linear")(9) == pytest.approx(0.05 / 0.97)


@pytest.mark.slow
def test_texts_of_all_kinds_are_the_same_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    teacher = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    text = Path(argparse.__file__).read_text()[:3000]
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    kinds = [text, [text], ({"text": text} for _ in range(1)), ids, [ids.tolist()], [{"input_ids": ids}]]
    options = SHORT | {"tokens": 128, "batch_size": 2, "window": 32}
    found = []
    for kind in kinds:
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            student.model.norm.weight.mul_(0.5)
        found.append(uptrain(student, teacher, kind, tokenizer=tokenizer, **options).after)
    assert found[0].kl > 0
    assert all(quality == found[0] for quality in found)


@pytest.mark.slow
def test_arguments_of_the_trainer_count() -> None:
    arguments = TrainingArguments(
        output_dir="never-made", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, seed=9,
        learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    result = uptrain(changed("llama"), build("llama"), IDS, arguments=arguments, window=16, picture=False)
    assert (result.steps, result.tokens, result.learning_rate) == (3, 3 * 2 * 2 * 16, 1e-2)
    arguments.bf16, student = True, changed("llama")  # accelerate wraps the forward of the model
    uptrain(student, build("llama"), IDS, arguments=arguments, window=16, picture=False)
    assert vars(student).keys() == vars(changed("llama")).keys()
    assert not Path("never-made").exists()


@pytest.mark.slow
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    uptrain(changed("llama"), build("llama"), IDS, steps=2, out=tmp_path, **{**SHORT, "picture": True})
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# what is refused


@pytest.mark.parametrize("package, options", [("matplotlib", {"picture": "curve.png"}), ("peft", {"lora_rank": 2})])
def test_a_package_that_is_missing_is_named_first(
    package: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf-accel\["):
        uptrain(changed("llama"), build("llama"), IDS, steps=1, **(SHORT | options))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"steps": None}, "Give one of minutes, tokens and steps"),
    "two budgets": ({"minutes": 1}, "Give one of minutes, tokens and steps"),
    "no steps": ({"steps": 0}, "more than 0"),
    "strings": ({"text": "some text"}, "give the tokenizer"),
    "a number": ({"text": 3.0}, "token ids"),
    "floats": ({"text": torch.rand(3, 40)}, "neither a text nor token ids"),
    "other words": ({"text": IDS + 500}, "outside the model's vocabulary"),
    "little text": ({"text": IDS[:1]}, "two windows of 16"),
    "little held out": ({"held_out": IDS[0, :4]}, "held_out has less than one window"),
    "held out of nothing": ({"text": None, "held_out": IDS}, "held_out belongs to a text"),
    "temperature": ({"temperature": 0}, "temperature is more than 0"),
    "share": ({"cross_entropy_share": 1.5}, "between 0 and 1"),
    "weight": ({"hidden_weight": -1.0}, "hidden_weight is 0 or more"),
    "decay": ({"decay": "steep"}, '"cosine" or "linear"'),
    "a picture nowhere": ({"picture": True}, "give out="),
    "window": ({"window": 1}, "window is 2 tokens or more"),
    "hidden sizes": ({"hidden_weight": 1.0, "teacher": lambda: build("qwen2")}, "Leave hidden_weight out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    pytest.importorskip("matplotlib") if name == "a picture nowhere" else None
    given, words = REFUSED[name]
    options = SHORT | {"steps": 1, "text": IDS} | given
    make: Callable[[], Any] = options.pop("teacher", lambda: build("llama"))
    student = changed("llama")
    with pytest.raises(ConfigError, match=words):
        uptrain(student, make(), options.pop("text"), **options)
    assert_same_bits(bits(student), bits(changed("llama")))


def test_models_that_cannot_be_trained_are_refused() -> None:
    teacher = build("llama")
    packed = hf_accel.optimize(build("llama"), WeightOnlyConfig(bits=8))
    frozen = build("llama").requires_grad_(False)
    small = AutoModelForCausalLM.from_pretrained(demo_path())
    for student, kind, words in (
        (teacher, ConfigError, "the same object"),
        (small, ConfigError, "vocabulary"),
        (packed, ConflictError, "hf_accel.restore"),
        (frozen, UnsupportedModelError, "requires_grad"),
        (nn.Linear(2, 2), UnsupportedModelError, "transformers model"),
    ):
        with pytest.raises(kind, match=words):
            uptrain(student, teacher, IDS, steps=1, **SHORT)


def test_a_folder_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    options = SHORT | {"steps": 2, "out": tmp_path}
    uptrain(changed("llama"), build("llama"), IDS, **options)
    for other in ({"seed": 1}, {"text": IDS.flip(0)}, {"student": build("llama")}, {"learning_rate": 1.0}):
        text, student = other.pop("text", IDS), other.pop("student", changed("llama"))
        with pytest.raises(ConfigError, match="another run"):
            uptrain(student, build("llama"), text, **(options | other))  # type: ignore[arg-type]
    (tmp_path / "checkpoint-2" / "trained.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"trained\.pt is damaged"):
        uptrain(changed("llama"), build("llama"), IDS, **options)
    (tmp_path / "uptrain.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"uptrain\.json is damaged"):
        uptrain(changed("llama"), build("llama"), IDS, **options)
