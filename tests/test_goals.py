"""Goals that trade quality: the text, the measure, the bits within the bound, and what "fast" and "memory" promise."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from fingerprint import changes, fingerprint
from models import FEW, NAMES, VOCABULARY, build, padded, prompt
from texts import tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
import hf_accel.planner
from hf_accel import ConfigError, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.calibration import DEFAULT_MAX_KL, calibration_text, choose_bits, losers
from hf_accel.calibration.text import ROWS, TOKENS
from hf_accel.core.anatomy import Anatomy
from hf_accel.core.plan import Step
from hf_accel.measure import Run
from hf_accel.measure.quality import CalibrationText, Quality, QualityReference
from hf_accel.quantization.linear import QuantizedLinear
from hf_accel.quantization.weight_only import targets

EIGHT, FOUR = WeightOnlyConfig(bits=8), WeightOnlyConfig(bits=4, group_size=32)
TEXT = Path(__file__).read_text()[:4000]


def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing decides nothing, so that a test does not depend on how busy the machine is."""

    def same_time(model: Any, inputs: Any, new_tokens: int, **arguments: Any) -> Run:
        return Run(0.001, [0.001] * (new_tokens - 1), inputs["input_ids"])

    monkeypatch.setattr(hf_accel.planner, "BUDGET_S", 0.3)
    monkeypatch.setattr(hf_accel.planner, "NOISE", 0.9)
    monkeypatch.setattr(hf_accel.planner, "timed_generate", same_time)
    monkeypatch.setattr(hf_accel.planner, "losers", lambda anatomy, config: [])


def chosen(plan: hf_accel.Plan) -> WeightOnlyConfig | None:
    return next((step.config for step in plan.steps if isinstance(step.config, WeightOnlyConfig)), None)


# -- the text


def test_given_ids() -> None:
    model, ids = build("llama"), prompt(3, 9)
    for given in (ids, ids.tolist(), {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        text = calibration_text(model, given)
        assert torch.equal(text.ids, ids)
        assert not text.is_own
    assert torch.equal(calibration_text(model, ids[0]).ids, ids[:1])
    assert calibration_text(model, tokenizer()("abacad", return_tensors="pt")).ids.shape == (1, 3)
    assert calibration_text(model, prompt(1, 700)).ids.shape == (1, 512), "cut to the model's context"


def test_given_strings_are_joined_and_cut_into_rows() -> None:
    words = tokenizer()
    found = calibration_text(build("llama"), ["abac" * 100, "adae" * 100], words)
    joined = words("abac" * 100 + "adae" * 100)["input_ids"]
    assert found.ids.flatten().tolist() == joined[: found.ids.numel()]
    assert found.ids.shape == (1, 256)
    assert torch.equal(
        calibration_text(build("llama"), "abac", words).ids, calibration_text(build("llama"), ["abac"], words).ids
    )


@pytest.mark.parametrize(
    "given, words",
    [
        ({**padded([4, 9])}, "padding"),
        ("some text", "give the tokenizer"),
        (["some", "text"], "give the tokenizer"),
        ([], "token ids"),
        (torch.zeros(0, 8, dtype=torch.long), "token ids"),
        (torch.zeros(2, 1, dtype=torch.long), "token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "token ids"),
        (torch.rand(2, 8), "token ids"),
        ([[1, 2, 3], [4]], "token ids"),
        (object(), "token ids"),
        ({"attention_mask": torch.ones(1, 4)}, "token ids"),
        (torch.full((1, 4), VOCABULARY), "vocabulary"),
        (torch.full((1, 4), -1), "vocabulary"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibration_text(build("llama"), given)


def test_text_without_a_token_is_refused() -> None:
    for given in ("", ["", ""]):
        with pytest.raises(ConfigError, match="token ids"):
            calibration_text(build("llama"), given, tokenizer())


@pytest.mark.parametrize("name", NAMES)
def test_own_text_is_the_same_every_time(name: str) -> None:
    model = build(name)
    before, random = fingerprint(model), torch.get_rng_state()
    text = calibration_text(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not changes(before, fingerprint(model))
    torch.rand(3)
    assert torch.equal(calibration_text(model).ids, text.ids)
    assert text.ids.shape == (ROWS, TOKENS + 1)
    assert text.is_own
    assert len(text.ids[:, 1:].unique(dim=0)) == ROWS, "samples, not one text"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["abc"]},
        {"max_time": 1e-3},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"eos_token_id": list(range(2, VOCABULARY))},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_own_text_does_not_heed_generation_settings(settings: dict[str, Any]) -> None:
    model = build("llama")
    expected = calibration_text(model).ids
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    before = fingerprint(model)
    assert torch.equal(calibration_text(model).ids, expected)
    assert not changes(before, fingerprint(model))


# -- the measure


def textbook(original: Any, changed: Any, ids: torch.Tensor) -> dict[str, float]:
    """Sums over tokens one by one, in double precision."""
    kl = equal = before = after = 0.0
    count = 0
    for row in ids:
        with torch.no_grad():
            one, two = (model(row[None]).logits[0].double().softmax(-1) for model in (original, changed))
        for position in range(len(row) - 1):
            p, q = one[position].tolist(), two[position].tolist()
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
            equal += p.index(max(p)) == q.index(max(q))
            before -= math.log(p[int(row[position + 1])])
            after -= math.log(q[int(row[position + 1])])
            count += 1
    return {
        "kl": kl / count,
        "top1_agreement": equal / count,
        "perplexity_before": math.exp(before / count),
        "perplexity_after": math.exp(after / count),
        "tokens": count,
    }


@pytest.mark.parametrize("name", FEW)
def test_quality_is_what_the_textbook_says(name: str) -> None:
    original, model, ids = build(name), build(name), prompt(2, 12)
    reference = QualityReference(model, CalibrationText(ids, "a test", False))
    hf_accel.optimize(model, WeightOnlyConfig(bits=4, head=4))
    found = reference.compare()
    for key, value in textbook(original, model, ids).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-3), key
    assert found.kl > 1e-4
    assert found.source == "a test"
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "perplexity" in str(found)


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_model_costs_nothing(name: str) -> None:
    model = build(name)
    found = QualityReference(model, calibration_text(model)).compare()
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.tokens == ROWS * TOKENS
    assert found.perplexity_before is None, "of its own text a model's perplexity says nothing"
    assert "perplexity" not in str(found)


def test_impossible_tokens_are_compared() -> None:
    """A model that gives some tokens no probability at all: 0 log 0 is 0, and what was possible must stay so."""
    model = build("llama")
    forward, shift = type(model.lm_head).forward, {"token": 5}

    def forbidding(x: torch.Tensor) -> torch.Tensor:
        logits = forward(model.lm_head, x).clone()
        logits[..., shift["token"]] = -math.inf
        return logits

    model.lm_head.forward = forbidding
    reference = QualityReference(model, CalibrationText(prompt(1, 8), "a test", True))
    assert reference.compare().kl == 0
    shift["token"] = 6
    assert reference.compare().kl == math.inf


def test_long_text_is_cut_to_what_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.measure.quality._KEPT_BYTES", 4 * VOCABULARY * 10 * 2)
    found = QualityReference(build("llama"), CalibrationText(prompt(5, 11), "a test", False)).compare()
    assert found.tokens == 20


# -- the bits


@pytest.mark.parametrize("goal, candidates", [("fast", 2), ("memory", 3)])
def test_bits_follow_the_bound(goal: str, candidates: int) -> None:
    model = demo()
    anatomy = Anatomy.of(model)
    reference = QualityReference(model, calibration_text(model))
    before = fingerprint(model)
    embeddings = 8 if goal == "memory" else None

    def measured(**options: Any) -> float:
        with hf_accel.optimized(model, WeightOnlyConfig(embeddings=embeddings, **options)):
            return reference.compare().kl

    eight, *four = measured(bits=8), *(measured(group_size=size) for size in (128, 64, 32))
    assert eight < 0.1 * min(four)
    calls: list[int] = []
    loose = choose_bits(anatomy, goal, reference, 10.0, lambda: calls.append(1))
    # groups of 128 do not divide this model's 192 columns: most products would get 8 bits
    assert loose.config == WeightOnlyConfig(group_size=64, embeddings=embeddings)
    assert loose.quality.kl == pytest.approx(four[1])
    assert len(calls) == 1

    bound = (eight + min(four)) / 2
    mixed = choose_bits(anatomy, goal, reference, bound, lambda: calls.append(1))
    assert mixed.config is not None
    assert mixed.config.embeddings == embeddings
    bits = [target.scheme.bits for target in targets(anatomy, mixed.config)[0] if target.scheme is not None]
    assert set(bits) == {4, 8}
    assert eight < mixed.quality.kl <= bound
    with hf_accel.optimized(model, mixed.config):
        assert reference.compare().kl == pytest.approx(mixed.quality.kl)
    assert len(calls) >= 1 + candidates + 1 + model.config.num_hidden_layers + 1

    strict = choose_bits(anatomy, goal, reference, eight / 2)
    assert strict.config is None
    assert strict.quality.kl == pytest.approx(eight)
    just = choose_bits(anatomy, goal, reference, eight * 1.01)
    assert just.config == WeightOnlyConfig(bits=8, embeddings=embeddings)
    assert not changes(before, fingerprint(model))


def test_a_measure_that_is_no_number_chooses_nothing() -> None:
    model = build("llama")

    class Broken:
        def compare(self) -> Quality:
            return Quality(math.nan, 0.0, None, None, 1, "a test")

    reference: Any = Broken()
    assert choose_bits(Anatomy.of(model), "fast", reference, 0.05).config is None


def test_a_slow_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo()
    anatomy = Anatomy.of(model)
    anatomy.prepared = WeakKeyDictionary()
    reference = QualityReference(model, CalibrationText(prompt(1, 8), "a test", False))
    choice = choose_bits(anatomy, "fast", reference, 10.0)
    assert choice.config is not None
    products = {target.path: target.module for target in targets(anatomy, choice.config)[0]}
    linear = torch.nn.Linear.forward
    slow_rows = model.config.intermediate_size  # gate and up, a shape of their own

    def dense(self: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(2e-3)
        return linear(self, x)

    def packed(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == slow_rows:
            time.sleep(2e-2)
        return x

    monkeypatch.setattr(torch.nn.Linear, "forward", dense)
    monkeypatch.setattr(QuantizedLinear, "forward", packed)
    found = losers(anatomy, choice.config, rounds=3)
    assert set(found) == {path for path, module in products.items() if module.out_features == slow_rows}
    assert len(found) == 2 * model.config.num_hidden_layers


@pytest.mark.usefixtures("settled")
def test_slow_products_stay_and_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(hf_accel.planner, "losers", lambda anatomy, config: [slow])
    model = hf_accel.optimize(demo(), "fast")
    assert not isinstance(model.get_submodule(slow), QuantizedLinear)
    assert isinstance(model.model.layers[2].mlp.down_proj, QuantizedLinear)
    skips = {skip.what: skip.reason for skip in hf_accel.report(model).skipped}
    assert slow in skips["WeightOnlyConfig"]
    hf_accel.restore(model)
    hf_accel.optimize(model, "memory")
    assert isinstance(model.get_submodule(slow), QuantizedLinear), "few bits are there to save memory"


# -- the goals


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("goal", ["fast", "memory"])
def test_a_goal_from_plan_to_restore(goal: str) -> None:
    model = demo()
    inputs = AutoTokenizer.from_pretrained(demo_path())("def add(a, b):", return_tensors="pt")
    ids = inputs["input_ids"]
    stock = model.generate(ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(ids).logits
    before, original_bytes = fingerprint(model), Anatomy.of(model).weight_bytes
    steps: list[int] = []

    plan = hf_accel.plan(model, goal)
    assert not changes(before, fingerprint(model))
    config = chosen(plan)
    assert config is not None
    assert config.bits == 4
    assert config.embeddings == (8 if goal == "memory" else None)
    assert plan.quality.kl <= DEFAULT_MAX_KL[goal]
    assert "quality: KL" in str(plan)
    assert "weights afterwards" in str(plan)
    again = hf_accel.Plan.from_json(plan.to_json())
    assert again.steps == plan.steps
    assert again.weight_bytes == plan.weight_bytes

    assert hf_accel.optimize(model, goal, progress=lambda: steps.append(1)) is model
    found = hf_accel.report(model)
    assert len(steps) > len(targets(Anatomy.of(demo()), config)[0])
    assert found.quality.kl <= DEFAULT_MAX_KL[goal]
    assert found.quality.source == "the model's own samples"
    assert found.patched_weight_bytes == Anatomy.of(model).weight_bytes
    assert found.patched_weight_bytes == pytest.approx(plan.weight_bytes, rel=0.02)
    assert found.patched_weight_bytes < (0.4 if goal == "fast" else 0.3) * original_bytes
    assert found.to_dict()["quality"] == found.quality.to_dict()
    assert "quality: KL" in str(found)
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.shape == stock.shape
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("goal", ["fast", "memory"])
def test_originals_that_are_dropped(goal: str) -> None:
    model = demo()
    plan = hf_accel.plan(model, goal)
    hf_accel.optimize(model, plan, originals="drop")
    after = Anatomy.of(model).weight_bytes
    assert after == pytest.approx(plan.weight_bytes, rel=0.02)
    assert after == hf_accel.report(model).patched_weight_bytes
    assert hf_accel.report(model).extra_bytes < 0.02 * after
    model.generate(prompt(), max_new_tokens=4, do_sample=False)
    with pytest.raises(hf_accel.IrreversibleError, match="given up"):
        hf_accel.restore(model)


@pytest.mark.usefixtures("settled")
def test_a_users_text_and_bound() -> None:
    model = demo()
    plan = hf_accel.plan(
        model, "fast", calibration=TEXT, tokenizer=AutoTokenizer.from_pretrained(demo_path()), max_kl=1e-9
    )
    assert chosen(plan) is None
    assert plan.quality is None
    assert plan.weight_bytes is None
    [reason] = [skip.reason for skip in plan.skipped if skip.what == "WeightOnlyConfig"]
    assert "even 8 bits cost more than max_kl=1e-09" in reason
    assert "perplexity" in reason
    assert plan.steps, "the exact steps remain"
    loose = hf_accel.plan(model, "fast", calibration=prompt(2, 40), max_kl=5)
    assert loose.quality.tokens == 78
    assert loose.quality.source == "the text given"


@pytest.mark.usefixtures("settled")
def test_an_edited_plan_without_the_weights() -> None:
    model = build("qwen2")
    before = fingerprint(model)
    hf_accel.optimize(model, hf_accel.plan(model, "fast", max_kl=100).without(WeightOnlyConfig))
    assert hf_accel.report(model).patched_weight_bytes is None
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("goal", ["fast", "memory"])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, goal: str) -> None:
    model = build(name)
    before = fingerprint(model)
    plan = hf_accel.plan(model, goal, max_kl=100)
    assert not changes(before, fingerprint(model))
    assert chosen(plan) is not None
    hf_accel.optimize(model, plan, verify_on=prompt())
    assert "no bound" in str(hf_accel.report(model).verified)
    assert Anatomy.of(model).weight_bytes == pytest.approx(plan.weight_bytes, rel=0.02)
    model.generate(**padded([4, 9]), max_new_tokens=4, do_sample=False)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.usefixtures("settled")
def test_a_model_quantized_already_keeps_its_weights() -> None:
    model = hf_accel.optimize(build("qwen2"), EIGHT, originals="drop")
    again = copy.deepcopy(model)
    plan = hf_accel.plan(again, "memory")
    assert chosen(plan) is None
    assert "quantized already" in {skip.what: skip.reason for skip in plan.skipped}["WeightOnlyConfig"]
    assert {type(step.config).__name__ for step in plan.steps} >= {"DecodingConfig"}


@pytest.mark.parametrize("verb", [hf_accel.plan, hf_accel.optimize])
@pytest.mark.parametrize(
    "goal, options, words",
    [
        ("exact", {"max_kl": 0.1}, "belong to the goals"),
        ("exact", {"calibration": prompt()}, "belong to the goals"),
        (EIGHT, {"max_kl": 0.1}, "configs are applied as they are given"),
        ([EIGHT], {"max_kl": 0.1}, "configs are applied as they are given"),
        ("fast", {"max_kl": 0}, "positive number"),
        ("memory", {"max_kl": -1.0}, "positive number"),
        ("fast", {"max_kl": math.nan}, "positive number"),
        ("fast", {"max_kl": "little"}, "positive number"),
        ("fast", {"calibration": "some text"}, "give the tokenizer"),
        ("tiny", {}, "no goal called"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(verb: Any, goal: Any, options: dict[str, Any], words: str) -> None:
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=words):
        verb(model, goal, **options)
    assert not changes(before, fingerprint(model))


def test_the_cost_of_configs_is_measured_where_text_is_given() -> None:
    model = demo()
    words = AutoTokenizer.from_pretrained(demo_path())
    hf_accel.optimize(model, EIGHT, calibration=TEXT, tokenizer=words)
    found = hf_accel.report(model).quality
    assert 0 < found.kl < 0.01
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.01)
    assert found.tokens > 500
    hf_accel.restore(model)
    hf_accel.optimize(model, FOUR)
    assert hf_accel.report(model).quality is None, "not asked for, not measured"
    hf_accel.restore(model)
    plan = hf_accel.Plan(steps=[Step(FOUR)])
    hf_accel.optimize(model, plan, calibration=prompt(2, 20))
    assert hf_accel.report(model).quality.kl > found.kl
