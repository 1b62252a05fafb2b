"""Goals that trade quality: the bits within the bound, and what "fast" and "memory" promise."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import build, on_models, padded, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
import hf_accel.planner.goals
import hf_accel.planner.timing
from hf_accel import ConfigError, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.plan import Step
from hf_accel.core.steps.setting import Setting
from hf_accel.measure import Run
from hf_accel.measure.quality import CalibrationText, Quality, QualityReference
from hf_accel.measure.text import calibration_text
from hf_accel.planner import GOALS
from hf_accel.quantization import candidates
from hf_accel.quantization.allocating import bounded as mixed_bits
from hf_accel.quantization.allocating.bounded import choose_bits
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.targets import targets
from hf_accel.quantization.timing import slower_products

EIGHT, FOUR = WeightOnlyConfig(bits=8), WeightOnlyConfig(bits=4, group_size=32)
TEXT = Path(__file__).read_text()[:4000]


def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing decides nothing, so that a test does not depend on how busy the machine is."""

    def same_time(model: Any, inputs: Any, new_tokens: int, **arguments: Any) -> Run:
        return Run(0.001, [0.001] * (new_tokens - 1), inputs["input_ids"])

    monkeypatch.setattr(hf_accel.planner.timing, "BUDGET_S", 0.3)
    monkeypatch.setattr(hf_accel.planner.timing, "NOISE", 0.9)
    monkeypatch.setattr(hf_accel.planner.timing, "timed_generate", same_time)
    monkeypatch.setattr(candidates, "slower_products", lambda setting, config: [])
    monkeypatch.setattr(candidates, "MOST_WRITING_S", 0.0)  # weights are rounded, which takes less time


def chosen(plan: hf_accel.Plan) -> WeightOnlyConfig | None:
    return next((step.config for step in plan.steps if isinstance(step.config, WeightOnlyConfig)), None)


@pytest.mark.parametrize("goal, count", [("fast", 2), ("memory", 5)])
def test_bits_follow_the_bound(goal: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo()
    setting = Setting.of(model)
    reference = QualityReference(model, calibration_text(model))
    before = fingerprint(model)
    embeddings = 8 if goal == "memory" else None

    def measured(**options: Any) -> float:
        with hf_accel.optimized(model, WeightOnlyConfig(embeddings=embeddings, **options)):
            return reference.compare().kl

    eight, *four = measured(bits=8), *(measured(group_size=size) for size in (128, 64, 32))
    two = measured(bits=2, group_size=64)
    assert eight < 0.1 * min(four)
    calls: list[int] = []

    def counted(*arguments: Any) -> Quality:
        calls.append(1)
        return real(*arguments)

    real = mixed_bits.measured
    monkeypatch.setattr(mixed_bits, "measured", counted)
    loose = choose_bits(setting, replace(GOALS[goal], max_kl=10.0), reference)
    # groups of 128 do not divide this model's 192 columns: most products would get 8 bits
    bits = 2 if goal == "memory" else 4
    assert loose.config == WeightOnlyConfig(bits=bits, group_size=64, embeddings=embeddings)
    assert loose.quality.kl == pytest.approx(two if goal == "memory" else four[1])
    assert len(calls) == 1

    bound = (eight + min(four)) / 2
    mixed = choose_bits(setting, replace(GOALS[goal], max_kl=bound), reference)
    assert mixed.config is not None
    assert mixed.config.embeddings == embeddings
    bits = [target.scheme.bits for target in targets(setting.anatomy, mixed.config)[0] if target.scheme is not None]
    assert set(bits) == {4, 8}
    assert eight < mixed.quality.kl <= bound
    with hf_accel.optimized(model, mixed.config):
        assert reference.compare().kl == pytest.approx(mixed.quality.kl)
    assert len(calls) >= 1 + count + 1 + model.config.num_hidden_layers + 1

    strict = choose_bits(setting, replace(GOALS[goal], max_kl=eight / 2), reference)
    assert strict.config is None
    assert strict.quality.kl == pytest.approx(eight)
    just = choose_bits(setting, replace(GOALS[goal], max_kl=eight * 1.01), reference)
    assert just.config == WeightOnlyConfig(bits=8, embeddings=embeddings)
    assert not changes(before, fingerprint(model))


def test_a_measure_that_is_no_number_chooses_nothing() -> None:
    model = build("llama")

    class Broken:
        def compare(self) -> Quality:
            return Quality(math.nan, 0.0, None, None, 1, "a test")

    reference: Any = Broken()
    assert choose_bits(Setting.of(model), GOALS["fast"], reference).config is None


def test_a_slow_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo()
    setting = Setting.of(model)
    setting.keep_prepared()
    reference = QualityReference(model, CalibrationText(prompt(1, 8), "a test", False))
    choice = choose_bits(setting, replace(GOALS["fast"], max_kl=10.0), reference)
    assert choice.config is not None
    products = {target.path: target.module for target in targets(setting.anatomy, choice.config)[0]}
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
    found = slower_products(setting, choice.config, rounds=3)
    assert set(found) == {path for path, module in products.items() if module.out_features == slow_rows}
    assert len(found) == 2 * model.config.num_hidden_layers


@pytest.mark.usefixtures("settled")
def test_slow_products_stay_and_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(candidates, "slower_products", lambda setting, config: [slow])
    model = hf_accel.optimize(demo(), "fast")
    assert not isinstance(model.get_submodule(slow), QuantizedLinear)
    assert isinstance(model.model.layers[2].mlp.down_proj, QuantizedLinear)
    skips = {skip.what: skip.reason for skip in hf_accel.report(model).skipped}
    assert slow in skips["WeightOnlyConfig"]
    hf_accel.restore(model)
    hf_accel.optimize(model, "memory")
    assert isinstance(model.get_submodule(slow), QuantizedLinear), "few bits are there to save memory"


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
    assert config.bits == (3 if goal == "memory" else 4)
    assert config.embeddings == (8 if goal == "memory" else None)
    assert plan.quality.kl <= (GOALS[goal].max_kl or 0)
    assert "quality: KL" in str(plan)
    assert "weights afterwards" in str(plan)
    again = hf_accel.Plan.from_json(plan.to_json())
    assert again.steps == plan.steps
    assert again.weight_bytes == plan.weight_bytes

    assert hf_accel.optimize(model, goal, progress=lambda: steps.append(1)) is model
    found = hf_accel.report(model)
    assert len(steps) > len(targets(Anatomy.of(demo()), config)[0])
    assert found.quality.kl <= (GOALS[goal].max_kl or 0)
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
@pytest.mark.parametrize("goal,name", on_models(["fast", "memory"], everywhere=["fast"]))
def test_every_architecture(goal: str, name: str) -> None:
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
