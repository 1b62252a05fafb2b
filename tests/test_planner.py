"""The planner applies what pays here and says why it left out the rest; plans and reports are honest and editable."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import torch
from catalogue import BY_NAME_ONLY, LOSSLESS, exact
from fingerprint import changes, fingerprint
from models import NAMES, UNDESCRIBED, build, padded, prompt

import hf_accel
import hf_accel.planner.goals
import hf_accel.planner.timing
from hf_accel import (
    AttentionConfig,
    DecoderBlockConfig,
    DecodingConfig,
    KVCacheConfig,
    NativeLinearConfig,
    Plan,
    SharedProjectionConfig,
    SpeculativeConfig,
    VerificationError,
)
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.core.steps.plan import Step
from hf_accel.decoding.loop import TokenLoop
from hf_accel.decoding.writing import Writing
from hf_accel.kernels import native
from hf_accel.layers.block import DecoderBlockPatcher
from hf_accel.planner.timing import Times, is_slower


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models need no second and a half; the decisions themselves are not changed."""
    monkeypatch.setattr(hf_accel.planner.timing, "BUDGET_S", 0.15)


def text(model: Any) -> torch.Tensor:
    return model.generate(**padded([4, 9]), max_new_tokens=12, do_sample=False)


def names(plan: Plan) -> set[str]:
    return {type(step.config).__name__ for step in plan.steps}


def skips(found: Any) -> dict[str, str]:
    return {skip.what: skip.reason for skip in found.skipped}


def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timing undecided, so that a test does not depend on how busy the machine is."""
    monkeypatch.setattr(hf_accel.planner.timing, "NOISE", 0.9)
    monkeypatch.setattr(hf_accel.planner.timing, "timed_generate", same_time)


def same_time(model: Any, inputs: Any, new_tokens: int, **arguments: Any) -> Any:
    from hf_accel.measure import Run

    return Run(0.001, [0.001] * (new_tokens - 1), inputs["input_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_leaves_the_model_untouched_and_names_every_candidate(name: str) -> None:
    model = build(name)
    expected = text(model)
    before, random = fingerprint(model), torch.get_rng_state()
    plan = hf_accel.plan(model)
    assert not changes(before, fingerprint(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert names(plan) | set(skips(plan)) == {type(config).__name__ for config in LOSSLESS} - {*BY_NAME_ONLY}
    assert not names(plan) & set(skips(plan))
    for what, reason in skips(plan).items():
        assert len(reason.split()) > 3, f"{what}: no reason for a user: {reason!r}"
    hf_accel.optimize(model, plan)
    assert torch.equal(text(model), expected)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_an_undescribed_architecture_gets_what_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_everything(monkeypatch)
    model = build(UNDESCRIBED)
    name, expected = type(model).__name__, text(model)
    hf_accel.optimize(model)
    found = hf_accel.report(model)
    assert "DecodingConfig" in {type(step.config).__name__ for step in found.applied}
    assert name in skips(found)["DecoderBlockConfig"]
    assert torch.equal(text(model), expected)


def test_a_slow_candidate_is_dropped_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_accel.planner.timing, "OVERHEAD_SHOWS_S", math.inf)  # however busy the machine is
    take = Writing.take

    def slow(self: Writing, step: Any) -> None:
        time.sleep(0.05)
        take(self, step)

    monkeypatch.setattr(Writing, "take", slow)
    model = build("llama")
    plan = hf_accel.plan(model)
    assert "DecodingConfig" not in names(plan)
    assert "pay" in skips(plan)["DecodingConfig"]
    if native.is_available():
        assert "DecoderBlockConfig" in names(plan), "one slow step must not take the others with it"


def test_one_disturbed_measurement_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a loss, as all steps together were slowed down by other programs, is measured again."""
    calls: list[set[str]] = []

    def times(ways: dict[str, Any], *arguments: Any, **options: Any) -> dict[str, list[Times]]:
        calls.append(set(ways))
        seconds = {"stock": 3.0, "all": 1.0 if len(calls) > 1 else 2.0, "DecodingConfig": 1.5}
        return {name: [Times([seconds.get(name, 2.5)] * 4)] for name in ways}

    monkeypatch.setattr(hf_accel.planner.timing, "alternate", times)
    monkeypatch.setattr(hf_accel.planner.timing, "OVERHEAD_SHOWS_S", math.inf)  # however busy the machine is
    plan = hf_accel.plan(build("llama"))
    assert "DecodingConfig" in names(plan)
    assert calls[1] == {"stock", "all", "DecodingConfig"}


def test_a_loss_is_shown_beyond_what_times_vary_by() -> None:
    assert is_slower(Times([1.1] * 8), Times([1.0] * 8))
    assert not is_slower(Times([1.01] * 8), Times([1.0] * 8)), "noise"
    assert not is_slower(Times([1.1, 1.1, 1.6, 1.7]), Times([1.0, 1.0, 1.5, 1.6])), "they vary by more than they differ"
    waiting = [5.0, 9.0, 20.0, 40.0]
    assert not is_slower(Times(waiting, [1.0] * 4), Times([4.0] * 4, [1.0] * 4)), "others had the machine"
    assert is_slower(Times([9.0] * 4, [1.0] * 4), Times([1.0] * 4, [1.0] * 4)), "it waits for something of its own"
    assert is_slower(Times([9.0] * 4, [1.3] * 4), Times([9.0] * 4, [1.0] * 4)), "the processor's time shows it"


def test_when_nothing_pays_nothing_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hf_accel.planner.timing.timed_generate

    def slower_when_optimised(model: Any, *arguments: Any) -> Any:
        run = real(model, *arguments)
        if hf_accel.core.calls.hosting.host_of(model) is not None:
            run.tokens_s[:] = [seconds + 1.0 for seconds in run.tokens_s]
        return run

    monkeypatch.setattr(hf_accel.planner.timing, "timed_generate", slower_when_optimised)
    monkeypatch.setattr(hf_accel.attention.ladder.Ladder, "pays", False)  # prompts have trials of their own
    model = build("llama")
    before = fingerprint(model)
    plan = hf_accel.plan(model)
    assert not plan.steps
    assert all(skips(plan).values())
    hf_accel.optimize(model, plan)
    assert "changes: none" in str(hf_accel.report(model))
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_a_candidate_that_fails_its_check_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, setting: Any, host: Any) -> Any:
        host.journal.set_attribute(setting.model, "half_done", True)
        raise VerificationError("the planted check failed for this layer")

    monkeypatch.setattr(DecoderBlockPatcher, "patch", fails)
    keep_everything(monkeypatch)
    model = build("llama")
    before = fingerprint(model)
    plan = hf_accel.plan(model)
    assert not changes(before, fingerprint(model))
    assert "DecoderBlockConfig" not in names(plan)
    if native.is_available():
        assert "planted check" in skips(plan)["DecoderBlockConfig"]
    assert "DecodingConfig" in names(plan)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(1, 128)), "max_length": 15},
        {"stop_strings": ["abc"]},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"max_time": 0.001},
    ],
    ids=str,
)
def test_a_models_own_generation_settings_do_not_disturb_planning(settings: dict[str, Any]) -> None:
    model = build("llama")
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    before = fingerprint(model)
    plan = hf_accel.plan(model)
    assert not changes(before, fingerprint(model))
    hf_accel.optimize(model, plan, verify_on=prompt())
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_a_model_with_a_short_context() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24, vocab_size=64)).eval()
    hf_accel.optimize(model)
    hf_accel.restore(model)


def test_json_round_trip_edit_and_apply() -> None:
    model = build("llama")
    everything = {type(config) for config in exact(model, speculates=True)}
    plan = Plan.of(exact(model, speculates=True))
    plan.steps[0] = Step(plan.steps[0].config, 1.5)
    again = Plan.from_json(plan.to_json())
    assert again.to_dict() == plan.to_dict()
    assert again.steps == plan.steps
    again = again.without(DecodingConfig)
    hf_accel.optimize(model, again)
    applied = {type(step.config) for step in hf_accel.report(model).applied}
    assert applied == everything - {DecodingConfig, SpeculativeConfig}, "speculation needs the token loop"
    assert hf_accel.report(model).applied[0].gain == 1.5
    text(model)
    calls = hf_accel.report(model).to_dict()["calls"]
    assert calls == {"served": 0, "delegated": 1, "reasons": {"no token loop of ours is applied": 1}}
    assert "1.50 x" in str(plan)


def test_a_plan_without_some_steps() -> None:
    plan = Plan.of([KVCacheConfig(), DecodingConfig(), AttentionConfig()])
    assert names(plan.without(DecodingConfig, KVCacheConfig)) == {"AttentionConfig"}
    assert len(plan.steps) == 3


def test_steps_are_applied_in_the_order_of_their_stages() -> None:
    model = build("llama")
    hf_accel.optimize(model, [DecodingConfig(), KVCacheConfig(), AttentionConfig(), SharedProjectionConfig()])
    order = [type(step.config) for step in hf_accel.report(model).applied]
    assert order == [SharedProjectionConfig, AttentionConfig, KVCacheConfig, DecodingConfig]


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    keep_everything(monkeypatch)
    monkeypatch.setattr(hf_accel.planner.timing, "read_bandwidth", lambda device: 40e9)
    hf_accel.optimize(model, "exact", verify_on=padded([4, 9]))
    found = hf_accel.report(model)
    text(model)
    model.generate(**padded([4, 9]), max_new_tokens=3, num_beams=2)
    data = json.loads(json.dumps(found.to_dict()))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert data["weight_bytes"] == parameters
    assert data["extra_bytes"] <= 0.02 * parameters
    assert data["dtype"] == "float32"
    assert data["goal"] == "exact"
    assert data["calls"]["served"] == 1
    assert data["calls"]["reasons"] == {"beam search": 1}
    assert {change["config"]["type"] for change in data["changes"]} == {type(s.config).__name__ for s in found.applied}
    assert {change["fidelity"] for change in data["changes"]} == {"exact"}
    speed = data["speed"]
    assert speed["ratio"] == pytest.approx(speed["patched_tokens_per_s"] / speed["stock_tokens_per_s"])
    table = model.get_input_embeddings().weight  # not tied to the head here: a token reads one row of it
    read = parameters - table.numel() * table.element_size()
    assert speed["achieved_bytes_per_s"] == pytest.approx(read * speed["patched_tokens_per_s"])
    assert speed["share_of_bandwidth"] == pytest.approx(speed["achieved_bytes_per_s"] / 40e9)
    printed = str(found)
    for word in (
        "LlamaForCausalLM",
        "tokens/s",
        "GB/s",
        "1 served",
        "1 delegated",
        "beam search",
        "verified",
        "changes",
    ):
        assert word in printed, f"{word!r} is not in the report:\n{printed}"
    for change in data["changes"]:
        assert change["summary"] in printed
    for skip in data["skipped"]:
        assert skip["reason"] in printed


def test_optimized_undoes_after_an_exception() -> None:
    model = build("llama")
    expected = text(model)
    before = fingerprint(model)
    with pytest.raises(KeyError, match="planted"), hf_accel.optimized(model, exact(model)) as same:  # noqa: PT012
        assert same is model
        assert torch.equal(text(model), expected)
        raise KeyError("planted")
    assert not changes(before, fingerprint(model))
    with hf_accel.optimized(model, exact(model)):
        assert hf_accel.report(model).applied
    assert not changes(before, fingerprint(model))
    with hf_accel.optimized(model, exact(model)):
        hf_accel.restore(model)  # inside already: nothing is left to do, and no error
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_passes(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    before = fingerprint(model)
    hf_accel.optimize(model, exact(model), verify_on=padded([5, 9]))
    assert "differ by" in str(hf_accel.report(model).verified)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_a_wrong_kernel_fails_verification_and_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    text(model)
    before = fingerprint(model)
    update = GrowingLayer.update

    def wrong(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(self, keys, values * 1.05, *args, **kwargs)

    monkeypatch.setattr(GrowingLayer, "update", wrong)
    with pytest.raises(VerificationError, match="restored"):
        hf_accel.optimize(model, [KVCacheConfig(), DecodingConfig()], verify_on=prompt())
    assert not changes(before, fingerprint(model))
    with pytest.raises(hf_accel.ConflictError):
        hf_accel.report(model)


def test_an_error_during_verification_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    text(model)
    before = fingerprint(model)

    def breaks(self: Any, call: Any) -> Any:
        raise RuntimeError("planted in the loop")

    monkeypatch.setattr(TokenLoop, "run", breaks)
    with pytest.raises(RuntimeError, match="planted"):
        hf_accel.optimize(model, [DecodingConfig()], verify_on=prompt())
    assert not changes(before, fingerprint(model))


@pytest.mark.native
def test_a_wrong_native_layer_is_found_by_its_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    call = native.NativeBlock.__call__
    monkeypatch.setattr(native.NativeBlock, "__call__", lambda self, *a, **k: call(self, *a, **k) * 1.01)
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(VerificationError, match="Layer 0"):
        hf_accel.optimize(model, [DecoderBlockConfig()])
    assert not changes(before, fingerprint(model))


@pytest.mark.native
def test_a_wrong_native_product_fails_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = native.linear
    monkeypatch.setattr(native, "linear", lambda *a, **k: linear(*a, **k) * 1.02)
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(VerificationError, match="restored"):
        hf_accel.optimize(model, [NativeLinearConfig()], verify_on=prompt())
    assert not changes(before, fingerprint(model))
