"""Goals beside named configs: these stay as they are, and the goal fills what they leave, for the model with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import CATALOGUE, LOSSLESS, fits
from fingerprint import changes, fingerprint
from mixtures import mixture
from models import FEW, build, padded, prompt
from transformers import AutoModelForCausalLM

import hf_accel
import hf_accel.planner.timing
from hf_accel import (
    AttentionConfig,
    ConfigError,
    DecoderBlockConfig,
    DecodingConfig,
    GQAConfig,
    KVCacheConfig,
    NativeLinearConfig,
    Plan,
    SharedProjectionConfig,
    SpeculativeConfig,
    UnsupportedModelError,
    VerificationError,
    WeightOnlyConfig,
)
from hf_accel.assets import demo_path
from hf_accel.core.steps.plan import Step
from hf_accel.core.steps.setting import Setting
from hf_accel.decoding.patcher import DecodingPatcher
from hf_accel.experts.offload.store import ExpertStore
from hf_accel.layers.block import DecoderBlockPatcher
from hf_accel.measure import Run
from hf_accel.ops import tolerances
from hf_accel.planner import Asked, addition
from hf_accel.quantization.patcher import WeightOnlyPatcher

FOUR = WeightOnlyConfig(bits=4, group_size=32)
LOSSY = [config for config in CATALOGUE if config not in LOSSLESS]


def settled(patch: pytest.MonkeyPatch) -> None:
    """Let timing decide nothing, so that a test does not depend on how busy the machine is."""

    def same_time(model: Any, inputs: Any, new_tokens: int, **arguments: Any) -> Run:
        return Run(0.001, [0.001] * (new_tokens - 1), inputs["input_ids"])

    patch.setattr(hf_accel.planner.timing, "BUDGET_S", 0.05)
    patch.setattr(hf_accel.planner.timing, "NOISE", 0.9)
    patch.setattr(hf_accel.planner.timing, "timed_generate", same_time)


def text(model: Any) -> torch.Tensor:
    return model.generate(**padded([4, 9]), max_new_tokens=12, do_sample=False)  # type: ignore[no-any-return]


def names(found: Any) -> set[str]:
    return {type(step.config).__name__ for step in found}


@pytest.mark.parametrize("config", LOSSY, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW[:2] else pytest.mark.slow) for n in FEW])
def test_the_text_is_that_of_the_config_alone(name: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model = build(name)
    stock, before = text(model), fingerprint(model)
    if not fits(config, model):
        with pytest.raises(UnsupportedModelError):
            hf_accel.optimize(model, ["exact", config])
        assert not changes(before, fingerprint(model))
        return
    with hf_accel.optimized(model, config):
        alone = text(model)
    with hf_accel.optimized(model, ["exact", config], verify_on=prompt()) as same:
        found = hf_accel.report(same)
        assert torch.equal(text(model), alone)
        assert found.calls is not None
        assert found.calls.served == 1
        assert names(found.applied) >= {type(config).__name__, "KVCacheConfig", "DecodingConfig", "SpeculativeConfig"}
        assert found.named == (type(config).__name__,)
        assert f"those with {type(config).__name__} alone (bound" in str(found.verified)
    assert not changes(before, fingerprint(model))
    assert torch.equal(text(model), stock)


@pytest.mark.native
def test_whole_layers_run_on_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model = hf_accel.optimize(build("llama"), ["exact", FOUR])
    found = hf_accel.report(model)
    assert "DecoderBlockConfig" in names(found.applied)
    assert "NativeLinearConfig" not in names(found.applied), "no plain product is left"
    [summary] = [step.summary for step in found.applied if type(step.config) is DecoderBlockConfig]
    assert summary.startswith("3 decoder layers")
    assert "goal exact beside WeightOnlyConfig" in str(found)
    assert "with WeightOnlyConfig alone ->" in str(found)
    assert found.to_dict()["named"] == ["WeightOnlyConfig"]
    assert found.addition is None


@pytest.mark.native
def test_products_of_4_bits_round_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 whole layers differ from the layers' own forward by more than fp32 explains: codes of inputs turn.

    How many turn differs between machines, so that no rounding of fp32 is let pass here.
    """
    settled(monkeypatch)
    monkeypatch.setitem(tolerances._TEXT, torch.float32, 0.0)
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    hf_accel.optimize(model, ["exact", WeightOnlyConfig(bits=4)], verify_on=prompt())
    assert names(hf_accel.report(model).applied) >= {"DecoderBlockConfig", "KVCacheConfig", "DecodingConfig"}
    written = text(model)
    model.save_pretrained(tmp_path)
    again = hf_accel.optimize(hf_accel.from_pretrained(tmp_path), verify_on=prompt())
    assert names(hf_accel.report(again).applied) >= {"DecoderBlockConfig", "KVCacheConfig", "DecodingConfig"}
    assert torch.equal(text(again), written)


def test_a_plan_beside_configs_is_read_back_edited_and_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model = build("llama")
    before = fingerprint(model)
    plan = hf_accel.plan(model, [FOUR, "exact"])
    assert not changes(before, fingerprint(model))
    assert [step.config for step in plan.named] == [FOUR]
    assert "plan for goal exact beside WeightOnlyConfig:" in str(plan)
    assert "(named)" in str(plan)
    with hf_accel.optimized(model, FOUR):
        alone = text(model)
        assert hf_accel.report(model).patched_weight_bytes == plan.weight_bytes
    again = Plan.from_json(plan.to_json())
    assert again.steps == plan.steps
    with hf_accel.optimized(model, again.without(DecoderBlockConfig)):
        assert names(hf_accel.report(model).applied) == names(plan.steps) - {"DecoderBlockConfig"}
        assert torch.equal(text(model), alone)
    assert not changes(before, fingerprint(model))


def test_a_named_place_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model = build("llama")
    stock = text(model)
    named = [SharedProjectionConfig(max_rows=4), KVCacheConfig(prefix_reuse=True), SpeculativeConfig(drafter="self")]
    hf_accel.optimize(model, ["exact", *named], verify_on=prompt())
    found = hf_accel.report(model)
    applied = [step.config for step in found.applied]
    assert all(config in applied for config in named)
    assert len({type(config) for config in applied}) == len(applied)
    skips = {skip.what: skip.reason for skip in found.skipped}
    assert skips["NativeLinearConfig"] == "SharedProjectionConfig has the linear products"
    assert torch.equal(text(model), stock)
    assert "alone" not in str(found.verified), "all steps are exact: the original's logits are the bound"


def test_a_lossy_cache_is_what_steps_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model, cache = build("llama"), KVCacheConfig(bits=8)
    with hf_accel.optimized(model, cache):
        alone = text(model)
    hf_accel.optimize(model, ["exact", cache], verify_on=prompt())
    assert names(hf_accel.report(model).applied) >= {"DecoderBlockConfig", "DecodingConfig", "KVCacheConfig"}
    assert torch.equal(text(model), alone)
    assert "those with KVCacheConfig alone (bound" in str(hf_accel.report(model).verified)


def test_a_lossy_goal_is_bounded_against_the_model_with_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    monkeypatch.setattr(hf_accel.quantization.candidates, "slower_products", lambda setting, config: [])
    monkeypatch.setattr(hf_accel.quantization.candidates, "MOST_WRITING_S", 0.0)
    model = build("llama")
    before = fingerprint(model)
    heads = GQAConfig(num_kv_heads=1, method="mean")
    hf_accel.optimize(model, ["memory", heads], max_kl=100.0)
    found = hf_accel.report(model)
    assert names(found.applied) >= {"GQAConfig", "WeightOnlyConfig", "DecodingConfig"}
    assert found.quality.against == "the model with GQAConfig"
    assert "against the model with GQAConfig" in str(found)
    hf_accel.restore(model)
    ids = prompt(2, 40)
    hf_accel.optimize(model, ["memory", FOUR], calibration=ids)
    assert "WeightOnlyConfig" in names(hf_accel.report(model).applied)
    joint = hf_accel.report(model).quality
    hf_accel.restore(model)
    hf_accel.optimize(model, FOUR, calibration=ids)
    assert joint.kl == pytest.approx(hf_accel.report(model).quality.kl, rel=0.05), "against the original, as alone"
    assert joint.against == ""
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_a_wrong_step_is_found_against_the_model_with_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside weights in few bits there is a bound all the same: the goal's steps are exact."""
    settled(monkeypatch)
    model = build("llama")
    before = fingerprint(model)
    monkeypatch.setattr(hf_accel.planner.goals, "keep_what_pays", lambda *_: None)
    patch = DecodingPatcher.patch

    def wrong(self: Any, setting: Setting, host: Any) -> Any:
        embed = setting.model.get_output_embeddings()
        handle = embed.register_forward_hook(lambda module, args, output: 1.2 * output)
        host.journal.did(handle.remove)
        return patch(self, setting, host)

    monkeypatch.setattr(DecodingPatcher, "patch", wrong)
    with pytest.raises(VerificationError, match="from those with WeightOnlyConfig alone"):
        hf_accel.optimize(model, ["exact", FOUR], verify_on=prompt())
    assert not changes(before, fingerprint(model))


def test_what_fails_of_the_goal_is_left_out_and_what_is_named_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model = build("llama")
    before = fingerprint(model)

    def fails(self: Any, setting: Setting, host: Any) -> Any:
        raise VerificationError("planted check")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderBlockPatcher, "patch", fails)
        with hf_accel.optimized(model, ["exact", FOUR]):
            assert "DecoderBlockConfig" not in names(hf_accel.report(model).applied)
        with pytest.raises(VerificationError, match="planted"):
            hf_accel.optimize(model, ["exact", FOUR, DecoderBlockConfig()])
    assert not changes(before, fingerprint(model))
    with monkeypatch.context() as patch:
        patch.setattr(WeightOnlyPatcher, "patch", fails)
        with pytest.raises(VerificationError, match="planted"):
            hf_accel.optimize(model, ["exact", FOUR])
        with pytest.raises(VerificationError, match="planted"):
            hf_accel.plan(model, ["exact", FOUR])
    assert not changes(before, fingerprint(model))


def test_slow_steps_are_dropped_beside_configs_and_named_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower_with_the_loop(model: Any, inputs: Any, new_tokens: int, **arguments: Any) -> Run:
        host = hf_accel.core.calls.hosting.host_of(model)
        slow = host is not None and {"DecodingConfig", "KVCacheConfig"} & names(host.report.applied)
        return Run(0.001, [0.002 if slow else 0.001] * (new_tokens - 1), inputs["input_ids"])

    settled(monkeypatch)
    monkeypatch.setattr(hf_accel.planner.timing, "NOISE", 0.02)
    monkeypatch.setattr(hf_accel.planner.timing, "timed_generate", slower_with_the_loop)
    plan = hf_accel.plan(build("llama"), ["exact", FOUR, KVCacheConfig(prefix_reuse=True)])
    assert {"WeightOnlyConfig", "KVCacheConfig"} <= names(plan.steps), "named, whatever they take"
    assert not {"WeightOnlyConfig", "KVCacheConfig"} & {skip.what for skip in plan.skipped}
    plan = hf_accel.plan(build("llama"), ["exact", FOUR])
    assert "DecodingConfig" not in names(plan.steps)
    assert "WeightOnlyConfig" in names(plan.steps)


@pytest.mark.native
def test_experts_in_a_file_are_moved_once_and_never_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    model = mixture("mixtral")
    stock, before = text(model), fingerprint(model)
    moved: list[int] = []
    real = ExpertStore.take
    monkeypatch.setattr(ExpertStore, "take", lambda self, *given: moved.append(1) or real(self, *given))
    named = hf_accel.ExpertOffloadConfig(share=0.7)
    plan = hf_accel.plan(model, ["exact", named])
    assert not moved
    assert "its steps were tried without ExpertOffloadConfig" in str(plan)
    assert plan.measured.beside == ()
    hf_accel.optimize(model, ["exact", named])
    assert len(moved) == 2, "once for each layer"
    assert "with ExpertOffloadConfig alone ->" in str(hf_accel.report(model))
    assert names(hf_accel.report(model).applied) >= {"ExpertOffloadConfig", "DecoderBlockConfig", "DecodingConfig"}
    assert "NativeExpertsConfig" not in names(hf_accel.report(model).applied)
    assert torch.equal(text(model), stock)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("originals", ["keep", "drop"])
def test_a_model_with_native_layers_is_saved_and_loaded(
    originals: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(monkeypatch)
    model = hf_accel.optimize(build("qwen2"), ["exact", FOUR], originals=originals)
    written = text(model)
    model.save_pretrained(tmp_path)
    again = hf_accel.optimize(hf_accel.from_pretrained(tmp_path))
    assert torch.equal(text(again), written)
    if originals == "drop":
        with pytest.raises(hf_accel.IrreversibleError):
            hf_accel.restore(model)


def test_configs_alone_say_what_a_goal_would_add() -> None:
    model = hf_accel.optimize(build("llama"), WeightOnlyConfig(bits=4, group_size=32))
    found = hf_accel.report(model)
    assert found.addition is not None
    assert found.addition.written == '["exact", WeightOnlyConfig(group_size=32)]'
    wanted = {"DecoderBlockConfig", "AttentionConfig", "KVCacheConfig", "DecodingConfig", "SpeculativeConfig"}
    assert wanted - set(found.addition.configs) <= {"DecoderBlockConfig"}, "which needs the native library"
    assert f'goal "exact" beside this would try {", ".join(found.addition.configs)}' in str(found)
    assert found.to_dict()["addition"]["goal"] == "exact"
    hf_accel.restore(model)
    everything = [NativeLinearConfig(), *(cls() for cls in (DecoderBlockConfig, AttentionConfig, DecodingConfig))]
    hf_accel.optimize(model, [*everything, SpeculativeConfig()])  # which needs the cache
    assert hf_accel.report(model).addition is None
    hf_accel.restore(model)
    hf_accel.optimize(model, Plan.of([FOUR]))
    assert hf_accel.report(model).addition is not None
    hf_accel.restore(model)
    hf_accel.optimize(model, Plan(goal="exact", steps=[Step(FOUR)]))
    assert hf_accel.report(model).addition is None, "a goal has been asked"


def test_nothing_is_timed_to_say_what_a_goal_would_add(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(hf_accel.attention.ladder.Ladder, "prepare", None)
    monkeypatch.setattr(type(model), "forward", None)
    found = addition(Setting.of(model), [DecodingConfig()])
    assert found is not None
    assert "AttentionConfig" in found.configs
    hf_accel.optimize(model, hf_accel.QATConfig(bits=4, group_size=32, start="nearest"))
    assert hf_accel.report(model).addition is None, "a model that is trained is not to be fast"


@pytest.mark.parametrize("verb", [hf_accel.plan, hf_accel.optimize])
@pytest.mark.parametrize(
    "value, options, words",
    [
        (["exact", "fast", FOUR], {}, "'exact', 'fast' were given. Keep one"),
        (["exact", "exact"], {}, "Keep one"),
        (["warp", FOUR], {}, "no goal called 'warp'"),
        (["exact"], {}, "pass 'exact' by itself"),
        ([], {}, "names nothing"),
        ((), {}, "names nothing"),
        (["exact", FOUR, 4], {}, "4 is a int"),
        (["exact", Plan()], {}, "is a Plan"),
        (None, {}, "None was given"),
        (["exact", FOUR], {"max_kl": 0.1}, "belong to the goals"),
        (["fast", FOUR], {"max_kl": -1.0}, "positive number"),
        (["exact", FOUR, WeightOnlyConfig(bits=8)], {}, "given more than once"),
        (["exact", FOUR, hf_accel.GPTQConfig(bits=4)], {}, "Keep one of them"),
    ],
    ids=str,
)
def test_lists_that_do_not_fit(verb: Any, value: Any, options: dict[str, Any], words: str) -> None:
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises((ConfigError, hf_accel.ConflictError), match=words):
        verb(model, value, **options)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("config", CATALOGUE, ids=lambda config: type(config).__name__)
def test_a_config_as_it_is_written_makes_it_again(config: Any) -> None:
    assert eval(config.written(), vars(hf_accel)) == config
    assert DecodingConfig().written() == "DecodingConfig()"


def test_what_is_asked_for() -> None:
    assert Asked.of("exact") == Asked("exact")
    assert Asked.of(FOUR) == Asked.of([FOUR]) == Asked(configs=(FOUR,))
    assert Asked.of((FOUR, "fast", KVCacheConfig())) == Asked("fast", (FOUR, KVCacheConfig()))
