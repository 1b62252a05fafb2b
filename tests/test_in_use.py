"""Setting up a model that is in use, hooked, or fails: true verdicts, errors of our tree, nothing left."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from catalogue import exact
from fingerprint import changes, fingerprint
from models import UNDESCRIBED, build, padded, prompt

import hf_accel
import hf_accel.planner.timing
from hf_accel import DecoderBlockConfig, DecodingConfig, KVCacheConfig, NativeLinearConfig, SpeculativeConfig
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.steps.patcher import Patcher
from hf_accel.kernels import native


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_accel.planner.timing, "BUDGET_S", 0.05)


def text(model: Any, **arguments: Any) -> torch.Tensor:
    return model.generate(**padded([4, 9]), max_new_tokens=10, do_sample=False, **arguments)


def reasons(model: Any, what: str) -> str:
    return "; ".join(skip.reason for skip in hf_accel.report(model).skipped if skip.what == what)


@pytest.mark.parametrize("goal", ["exact", "configs"])
def test_optimising_while_another_thread_generates(goal: str) -> None:
    model = build("gemma3")
    expected, stop, wrong = text(model), threading.Event(), []

    def generate() -> None:
        try:
            while not stop.is_set():
                if not torch.equal(text(model), expected):
                    wrong.append("other text")
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=generate) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            hf_accel.optimize(model, "exact" if goal == "exact" else exact(model))
            hf_accel.restore(model)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_planning_fires_no_hook_of_the_users() -> None:
    """Of any kind, on any module; nor does setting the plan up, where layers are audited and drafts tried."""
    model = build("llama")
    fired: Counter[str] = Counter()
    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_hook(lambda *_, name=name: fired.update([name])),
            module.register_forward_pre_hook(lambda *_, name=name: fired.update([name])),
            module.register_forward_hook(
                lambda *_, name=name: fired.update([name]), with_kwargs=True, always_call=True
            ),
        ]
    before = fingerprint(model)
    plan = hf_accel.plan(model)
    assert not fired
    assert not changes(before, fingerprint(model))
    hf_accel.optimize(model, plan)
    assert not fired
    for keywords in ({}, {"kv_cache": KVCacheConfig(bits=8)}, {"speculative": SpeculativeConfig(drafter="layer_skip")}):
        fired.clear()
        text(model, **keywords)
        assert set(fired) == {name for name, _ in model.named_modules()} - {"model.layers"}
        assert fired[""] <= 3 * 10, "setting a call's own config up runs no hooks, either"
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("drafter", ["self", "layer_skip"])
def test_drafts_fire_no_hook_of_the_users(drafter: str) -> None:
    """Neither where their drafter is set up nor where it drafts: what a hook sees are passes of the model itself."""
    model = build("llama")
    fired: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.update([name]))
    hf_accel.optimize(model, [KVCacheConfig(), DecodingConfig()])
    text(model, speculative=SpeculativeConfig(drafter=drafter, adaptive=False))
    counts = hf_accel.report(model).to_dict()["speculation"]
    assert counts["proposed"][drafter]
    assert set(fired.values()) == {1 + counts["steps"]}, "other passes than those of the prompt and of steps"


@pytest.mark.native
@pytest.mark.parametrize("part", ["", "mlp.up_proj", "self_attn", "input_layernorm"])
def test_a_hooked_layer_runs_as_it_is_and_the_report_says_so(part: str) -> None:
    model = build("llama")
    expected = text(model)
    hook = model.get_submodule(f"model.layers.1.{part}".rstrip(".")).register_forward_hook(lambda *_: None)
    hf_accel.optimize(model, [KVCacheConfig(), DecoderBlockConfig(), DecodingConfig()])
    assert torch.equal(text(model), expected)
    if part:
        assert "layer 1 is hooked" in reasons(model, "DecoderBlockConfig")
    hook.remove()
    assert torch.equal(text(model), expected)


@pytest.mark.native
def test_a_layer_that_is_not_as_described_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    layer = model.model.layers[2]
    layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj, torch.nn.Tanh())
    expected = text(model)
    hf_accel.optimize(model, [KVCacheConfig(), DecoderBlockConfig(), DecodingConfig()])
    assert "layers.2 runs as it is: self_attn.o_proj.1, a Tanh, is no norm" in reasons(model, "DecoderBlockConfig")
    calls: list[int] = []
    call = native.NativeBlock.__call__
    monkeypatch.setattr(native.NativeBlock, "__call__", lambda *a, **k: (calls.append(1), call(*a, **k))[1])
    assert torch.equal(text(model), expected)
    assert len(calls) >= 2 * 9, "the other two layers run natively"


class Foreign(Exception):
    """What no library of ours raises."""


@pytest.mark.parametrize("where", ["obstacles", "patch"])
@pytest.mark.parametrize("cls", [NativeLinearConfig, KVCacheConfig, DecodingConfig, SpeculativeConfig])
def test_foreign_errors_of_a_step(cls: type, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A goal leaves the step out, with the reason; by name it is an error of the tree with the cause chained."""

    def fails(self: Any, setting: Any, *host: Any) -> Any:
        if host:
            host[0].journal.set_attribute(setting.model, "half_done", True)
        raise Foreign("planted deep inside")

    config = cls()
    monkeypatch.setattr(Patcher.registry[cls], where, fails)
    model = build("llama")
    expected, before = text(model), fingerprint(model)
    with pytest.raises(hf_accel.UnsupportedModelError, match="planted deep inside") as raised:
        hf_accel.optimize(model, [config])
    assert isinstance(raised.value.__cause__, Foreign)
    assert not changes(before, fingerprint(model))
    hf_accel.optimize(model)
    assert "planted deep inside" in reasons(model, cls.__name__)
    assert cls not in {type(step.config) for step in hf_accel.report(model).applied}
    assert torch.equal(text(model), expected)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("error", [Foreign("no such input"), MemoryError(), RuntimeError("no memory")], ids=repr)
def test_a_model_whose_own_code_fails(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = fingerprint(model)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(type(model), "forward", fails)
    for goal in ("exact", "fast", "memory"):
        with pytest.raises(type(error)):
            text(model)
        hf_accel.optimize(model, goal)
        assert not hf_accel.report(model).applied
        hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_a_step_that_writes_other_logits_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_accel.cache.layers.growing import GrowingLayer

    update = GrowingLayer.update
    monkeypatch.setattr(GrowingLayer, "update", lambda s, k, v, *a, **o: update(s, k * 1.05, v, *a, **o))
    monkeypatch.setattr(hf_accel.planner.timing, "is_slower", lambda *_: False)  # whatever the clock says
    model = build(UNDESCRIBED)
    expected = text(model)
    hf_accel.optimize(model)
    assert "logits differ from stock's" in reasons(model, "KVCacheConfig")
    assert "DecodingConfig" in {type(step.config).__name__ for step in hf_accel.report(model).applied}
    assert torch.equal(text(model), expected)


@pytest.mark.parametrize("left_out", [[DecodingConfig], [DecodingConfig, KVCacheConfig]], ids=len)
def test_keywords_are_understood_whatever_was_found_to_pay(left_out: list[Any]) -> None:
    model = build("llama")
    expected = text(model)
    hf_accel.optimize(model, exact(model, *left_out))
    assert Door.TOKEN_LOOP not in host_of(model).doors
    for keywords in (
        {"speculative": True},
        {"speculative": "lookup"},
        {"speculative": False},
        {"speculative": SpeculativeConfig(drafter="lookup", adaptive=False, max_draft_tokens=3)},
        {"tenant": "a"},
        {"kv_cache": KVCacheConfig(bits=None)},
        {"kv_cache": KVCacheConfig(prefix_reuse=True), "tenant": "a", "speculative": "lookup"},
    ):
        assert torch.equal(text(model, **keywords), expected), keywords
    told = hf_accel.report(model).to_dict()["speculation"]
    assert told["calls"] or told["plain_calls"], "our loop had them, and drafted or said why not"
    assert text(model, kv_cache=KVCacheConfig(bits=8), speculative="lookup").shape[1] > 9


def test_trials_neither_leave_state_in_the_model_nor_depend_on_it() -> None:
    """Dynamic rotary embeddings keep the longest text so far."""
    model = build("llama")
    model.config.rope_parameters = {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
    }  # fmt: skip
    model.config.max_position_embeddings = 16
    model = type(model)(model.config).eval()
    fresh = fingerprint(model)
    hf_accel.optimize(copy.deepcopy(model))
    hf_accel.optimize(model)
    hf_accel.restore(model)
    assert not changes(fresh, fingerprint(model))
    model.generate(prompt(tokens=14), max_new_tokens=12, do_sample=False, pad_token_id=0)
    used = fingerprint(model)
    hf_accel.optimize(model)
    hf_accel.restore(model)
    assert not changes(used, fingerprint(model))


def test_two_threads_that_optimise_one_model() -> None:
    """One of them does; the other is told so, and nothing of its own is left."""
    model = build("llama")
    expected, before = text(model), fingerprint(model)
    barrier, outcomes = threading.Barrier(2), []

    def optimise() -> None:
        barrier.wait()
        try:
            hf_accel.optimize(model)
            outcomes.append("optimised")
        except hf_accel.ConflictError:
            outcomes.append("refused")

    threads = [threading.Thread(target=optimise) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["optimised", "refused"]
    assert torch.equal(text(model), expected)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
