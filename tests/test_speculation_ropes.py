"""Drafts write plain decoding's text where a step of several tokens is not a number of single ones.

Rotary frequencies that change with the length of the text, caches with windows under masks without, models that look
ahead, padding that a model hides in a way of its own: steps end where they have to, or the call is decoded plainly.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same_outcome, run
from models import PAD, SMALL, Tiny, build, padded, prompt, randomize
from speculating import FEW_TOKENS, always, counts, total
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_accel
from hf_accel import KVCacheConfig
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model import rope
from hf_accel.core.model.rope import MovingRope, moving_rope
from hf_accel.errors import UnsupportedModelError
from hf_accel.speculative import proof

BOUNDARY = 24
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": BOUNDARY,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
HEAD: dict[str, Any] = {"head_dim": 16, "max_position_embeddings": 128}
SHORT: dict[str, Any] = {"head_dim": 16, "max_position_embeddings": 64}
WINDOWS: dict[str, Any] = {"sliding_window": BOUNDARY, "num_hidden_layers": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", HEAD | {"rope_parameters": LONGROPE}),
    "dynamic": ("llama", SHORT | {"rope_parameters": DYNAMIC}),
    "longrope in some layers": (
        "gemma3_text",
        HEAD | WINDOWS | {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": DEFAULT}},
    ),
    "dynamic in some layers": (
        "gemma3_text",
        SHORT | WINDOWS | {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT}},
    ),
    "windows and masks": ("mistral", HEAD | {"sliding_window": BOUNDARY}),
    "windows without masks": ("llama", HEAD | {"sliding_window": BOUNDARY}),
    "looking ahead": ("bert", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}),
}
BATCHES_THAT_MOVE = [name for name in CASES if "rope" in name or "dynamic" in name]
PLAIN = {"windows without masks": "past the window of 24", "looking ahead": "other logits than single ones"}
ASKED: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": FEW_TOKENS}
CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: model.generate(prompt(1, 12), **ASKED),
    "sampled": lambda model: model.generate(prompt(1, 12, 4), **ASKED | {"do_sample": True}),
    "padded": lambda model: model.generate(**padded([9, 4, 11]), **ASKED),
}
Patch = pytest.MonkeyPatch


@functools.cache
def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model_type, values = CASES[name]
    config = AutoConfig.for_model(model_type, **(SMALL if model_type != "bert" else {}) | values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    randomize(model, Tiny(model_type, {}, 0.25, 0.2 if "gemma" in model_type else 1.0))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


@functools.cache
def expected(name: str) -> Any:
    return {title: run(call, copy.deepcopy(made(name))) for title, call in CALLS.items()}


def drafting(name: str, drafter: str = "lookup", **options: Any) -> Any:
    return hf_accel.optimize(copy.deepcopy(made(name)), [always(drafter, **options)])


@pytest.mark.parametrize("drafter", ["lookup", "self"])
@pytest.mark.parametrize("name", CASES)
def test_text_is_stocks_past_every_boundary(name: str, drafter: str) -> None:
    model = drafting(name, drafter)
    for title, call in CALLS.items():
        assert_same_outcome(expected(name)[title], run(call, model))
    found = counts(model)
    if name in PLAIN:
        assert list(found["plain_calls"].values()) == [len(CALLS)]
        assert PLAIN[name] in next(iter(found["plain_calls"]))
        assert PLAIN[name] in str(hf_accel.report(model))
        return
    assert total(found, "accepted") > 3, "nothing was drafted, so this proves nothing"
    batches = [reason for reason in found["plain_calls"] if "of the batch change before it ends" in reason]
    assert len(batches) == (name in BATCHES_THAT_MOVE)
    assert len(found["plain_calls"]) == len(batches)


def test_batches_on_one_side_of_a_switch_are_drafted_for() -> None:
    stock, model = made("longrope"), drafting("longrope")
    for lengths, new in (([9, 4, 11], BOUNDARY - 11 + 1), ([BOUNDARY, 4, 11], 30)):
        asked = ASKED | {"max_new_tokens": new}
        assert torch.equal(stock.generate(**padded(lengths), **asked), model.generate(**padded(lengths), **asked))
    assert not counts(model)["plain_calls"]
    model.generate(**padded([9, 4, 11]), **ASKED | {"max_new_tokens": BOUNDARY - 11 + 2})
    assert len(counts(model)["plain_calls"]) == 1


def test_a_text_beyond_a_dynamic_rope_is_decoded_plainly() -> None:
    model = drafting("dynamic")
    ids = prompt(1, 64)
    assert torch.equal(made("dynamic").generate(ids, **ASKED), model.generate(ids, **ASKED))
    (reason,) = counts(model)["plain_calls"]
    assert reason.endswith("at every token from 64 on")


def test_positions_of_the_callers_own_decide_where_steps_end() -> None:
    stock, model = made("longrope"), drafting("longrope")
    for first in (3, BOUNDARY - 12, BOUNDARY):
        asked = ASKED | {"position_ids": torch.arange(first, first + 12)[None]}
        assert torch.equal(stock.generate(prompt(1, 12), **asked), model.generate(prompt(1, 12), **asked))
    assert total(counts(model), "accepted") > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_are_found_in_half_precision(dtype: torch.dtype) -> None:
    for name in ("windows without masks", "looking ahead"):
        model = hf_accel.optimize(copy.deepcopy(made(name)).to(dtype), [always("lookup")])
        assert PLAIN[name] in host_of(model).doors[Door.DRAFTS].proof.obstacle  # type: ignore[union-attr]
    for name in ("windows and masks", "longrope"):
        model = hf_accel.optimize(copy.deepcopy(made(name)).to(dtype), [always("lookup")])
        found = host_of(model).doors[Door.DRAFTS].proof  # type: ignore[union-attr]
        assert (found.obstacle, found.apart) == (None, None)


def test_the_report_says_where_drafts_end() -> None:
    text = str(hf_accel.report(drafting("longrope")))
    assert "no drafts across 24 tokens, where batches are decoded plainly: its rotary embeddings (longrope)" in text


# ── what moves a rope ─────────────────────────────────────────────────────────


def test_room_and_steadiness() -> None:
    switching, growing = MovingRope(("longrope",), (8,)), MovingRope(("dynamic",), beyond=8)
    assert [switching.room(n) for n in (0, 7, 8, 20)] == [8, 1, None, None]
    assert [growing.room(n) for n in (0, 7, 8, 20)] == [8, 1, 1, 1]
    assert switching.is_steady(0, 8)
    assert not switching.is_steady(0, 9)
    assert switching.is_steady(8, 99)
    assert not growing.is_steady(8, 10)


def test_ropes_are_found_wherever_configs_and_modules_have_them() -> None:
    def found(**values: Any) -> Any:
        return moving_rope(LlamaForCausalLM(LlamaConfig(**SMALL | HEAD | values)))

    assert found() is None
    assert found(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}) is None
    assert found(rope_parameters=LONGROPE) == MovingRope(("longrope",), (BOUNDARY,))
    old = {name: value for name, value in DYNAMIC.items() if name == "factor"} | {"type": "dynamic"}
    assert found(rope_scaling=old) == MovingRope(("dynamic",), beyond=128)
    for name in ("longrope in some layers", "dynamic in some layers"):
        assert moving_rope(made(name)) == moving_rope(made(name.partition(" ")[0]))
    model = build("llama")
    model.config.rope_parameters = DEFAULT  # type: ignore[assignment]
    model.model.rotary_emb.rope_type = "dynamic"
    assert moving_rope(model) == MovingRope(("dynamic",), beyond=512)


class MyDynamicNTKRotary(torch.nn.Module):
    """As a model with code of its own may have it."""

    def __init__(self) -> None:
        super().__init__()
        self.max_position_embeddings = 40
        self.register_buffer("inv_freq", torch.ones(4))


def test_rotary_code_of_others_is_known_by_its_name_or_tried() -> None:
    model = build("llama")
    model.extra = MyDynamicNTKRotary()
    assert moving_rope(model) == MovingRope(("MyDynamicNTKRotary",), beyond=40)
    assert rope.unfamiliar_lengths(model) == [512]
    assert rope.unfamiliar_lengths(build("llama")) == []


@pytest.mark.parametrize("name", BATCHES_THAT_MOVE)
def test_prefixes_ask_the_same_place(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="depend on the length of the text"):
        hf_accel.optimize(copy.deepcopy(made(name)), [KVCacheConfig(prefix_reuse=True)])


# ── set-up ────────────────────────────────────────────────────────────────────


def test_set_up_leaves_nothing_in_the_model_and_finds_nothing() -> None:
    model = copy.deepcopy(made("dynamic"))
    model.generate(prompt(1, 60), max_new_tokens=30, do_sample=False)  # stock keeps the longest text so far
    rotary = model.model.rotary_emb
    before = (int(rotary.max_seq_len_cached), rotary.inv_freq.clone())
    hf_accel.optimize(model, [always("self")])
    assert int(rotary.max_seq_len_cached) == before[0] > 64
    assert torch.equal(rotary.inv_freq, before[1])


def test_a_failing_trial_is_an_error_of_ours_with_its_cause() -> None:
    model = copy.deepcopy(made("windows and masks"))
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs) if not kwargs.get("use_cache") else 1 / 0
    with pytest.raises(UnsupportedModelError, match="ZeroDivisionError") as raised:
        hf_accel.optimize(model, [always("lookup")])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# ── mistakes planted ──────────────────────────────────────────────────────────


def without_bounds(patch: Patch) -> None:
    patch.setattr(MovingRope, "room", lambda self, position: None)


def without_bounds_for_batches(patch: Patch) -> None:
    patch.setattr(MovingRope, "is_steady", lambda self, first, stop: True)


def without_proof(patch: Patch) -> None:
    patch.setattr(proof.Wide, "is_equal", lambda self, tolerance: True)


def without_windows(patch: Patch) -> None:
    patch.setattr(proof, "widest_window", lambda model: None)


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        (without_bounds, "longrope"),
        (without_bounds_for_batches, "longrope"),
        (without_proof, "windows without masks"),
        (without_windows, "windows without masks"),
        (without_proof, "looking ahead"),
    ],
)
def test_a_planted_defect_is_seen(defect: Callable[[Patch], None], name: str, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        defect(patch)
        with pytest.raises(AssertionError):
            test_text_is_stocks_past_every_boundary(name, "lookup")


def test_ropes_within_others_are_seen(monkeypatch: Patch) -> None:
    outer = rope._parameters
    monkeypatch.setattr(rope, "_parameters", lambda config: outer(config)[:1])
    with pytest.raises(pytest.fail.Exception):
        test_prefixes_ask_the_same_place("longrope in some layers")
    test_prefixes_ask_the_same_place("longrope")
