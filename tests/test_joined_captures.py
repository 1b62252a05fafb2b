"""Concurrent calls whose steps are captured: one replay for all rows, and each gets the text that it gets alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from capturing import captures_here
from models import build, padded, prompt, stock
from test_batching import until
from test_joined_calls import NEW, alone, assert_same, together

import hf_accel
from hf_accel import AttentionConfig, CompilationConfig, DecodingConfig, KVCacheConfig, SpeculativeConfig
from hf_accel.batching.engine import Engine
from hf_accel.compilation import runner, shared
from hf_accel.compilation.joint import JointSteps
from hf_accel.compilation.shared import SharedSlot
from hf_accel.core.calls.cancelling import cancellable
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of

STEPS = [AttentionConfig(), DecodingConfig(), CompilationConfig()]
MODELS = ["llama", "gemma3", "gpt2"]


@contextmanager
def sharing(model: Any, joining: int = 0, *more: Any, alone: bool = False, **fields: Any) -> Iterator[Engine]:
    """Let calls of an optimised model join, whose steps are captured at once: so many wait for one another.

    alone: whether a step may be made for one call, as measured.
    """
    with pytest.MonkeyPatch.context() as patch, captures_here():
        patch.setattr(runner, "PAYS_BACK", 0)
        with hf_accel.optimized(model, [*STEPS, *more]), hf_accel.serving(model, **({"max_wait_ms": 2000.0} | fields)):
            engine: Engine = type(model)._hf_accel_engine
            if not alone:
                engine._goes_alone = lambda: False  # type: ignore[method-assign]
            if joining:
                wait_for_one_another(engine, joining)
            yield engine


def wait_for_one_another(engine: Any, calls: int) -> None:
    everybody, join = threading.Barrier(calls), type(engine.meeting).join
    engine.meeting.join = lambda: (join(engine.meeting), everybody.wait(20))


def compiled(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = hf_accel.report(model).to_dict()["compilation"]
    return found


def joined(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = hf_accel.report(model).to_dict()["joined_calls"]
    return found


def slots_of(model: Any) -> list[SharedSlot]:
    host: Any = host_of(model)
    found: list[SharedSlot] = host.doors[Door.NEW_CACHE].slots.shared
    return found


def assert_all_shared(model: Any) -> None:
    """Every call joined, and every step was a replay."""
    found = compiled(model)
    assert (found["eager_steps"], found["calls_without_buffers"]) == ({}, {})
    assert joined(model)["alone"] == {}
    assert not any(slot.is_in_use() for slot in slots_of(model))


WAYS: list[tuple[int, dict[str, Any]]] = [
    (5, {"do_sample": False}),
    (19, {"do_sample": False, "max_new_tokens": 17}),
    (11, {"do_sample": True, "temperature": 1.3, "seed": 3}),
    (30, {"do_sample": False, "repetition_penalty": 1.4, "max_new_tokens": 7}),
]
PAIR = [9, 4]


def calls_of(model: Any) -> list[Callable[[], Any]]:
    """Return four calls of one row and one of two, of which one is padded."""
    found = [functools.partial(model.generate, prompt(1, size, seed=size), **(NEW | way)) for size, way in WAYS]
    return [*found, functools.partial(model.generate, **padded(PAIR), **NEW, do_sample=False)]


@functools.cache
def texts_of(name: str) -> list[torch.Tensor]:
    """Return what stock writes in these calls."""
    model = stock(name)
    found = [alone(model, way, prompt(1, size, seed=size)) for size, way in WAYS]
    return [*found, model.generate(**padded(PAIR), **NEW, do_sample=False)]


@pytest.mark.parametrize("name", MODELS)
def test_each_call_gets_the_text_that_it_gets_alone(name: str) -> None:
    model = build(name)
    with sharing(model, 5) as engine:
        assert_same(together(calls_of(model)), texts_of(name))
        assert_all_shared(model)
        counts, found = joined(model), compiled(model)
        assert counts["joined"] == 5
        assert counts["most_rows"] == 6
        assert counts["rows_per_step"] > 2
        assert 16 <= found["replays"] < 36, "one for the rows of all: there are 72 new tokens"
        (slot,) = slots_of(model)
        assert (slot.rows, slot.capacity) == (32, 256)
        assert found["buffer_bytes"] >= slot.bytes > 0
        # the same again, over what was captured
        wait_for_one_another(engine, 5)
        assert_same(together(calls_of(model)), texts_of(name))
        assert slots_of(model) == [slot]
        assert_all_shared(model)


def test_codes_are_shared_as_well() -> None:
    model = build("llama")
    prompts = [prompt(1, 7 + place, seed=place) for place in range(3)]
    with captures_here(), hf_accel.optimized(model, [*STEPS, KVCacheConfig(bits=8)]):
        wanted = [model.generate(ids, **NEW, do_sample=False) for ids in prompts]
    with sharing(model, 3, KVCacheConfig(bits=8)):
        assert_same(together([lambda ids=ids: model.generate(ids, **NEW, do_sample=False) for ids in prompts]), wanted)
        assert_all_shared(model)
        assert slots_of(model)[0].bits == 8


class Steps:
    """A processor that counts the steps of its call, and does something at one of them."""

    def __init__(self, at: int = 0, do: Callable[[], Any] = lambda: None) -> None:
        self.count, self.at, self.do = 0, at, do

    def __call__(self, ids: torch.Tensor, scores: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            self.do()
        return scores


def fail() -> None:
    raise RuntimeError("mine alone")


def test_a_prompt_is_read_while_steps_write_to_its_row() -> None:
    """The row of a call that ended is given to the next, whose prompt is read in chunks between steps of another."""
    model = build("gpt2")
    ids = [prompt(1, size, seed=size) for size in (4, 6, 40)]
    new: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 60},
        {"max_new_tokens": 9, "prefill_chunk_size": 8},
    ]
    given = {"do_sample": False, "pad_token_id": 0}
    wanted = [
        model.generate(each, **given, **(own | {"prefill_chunk_size": None}))
        for each, own in zip(ids, new, strict=True)
    ]
    with sharing(model, max_wait_ms=1.0) as engine:
        writing, honest, ended = Steps(), engine.passing, threading.Event()

        @contextmanager
        def after_two_steps(tokens: int) -> Iterator[None]:
            begin = writing.count
            if ended.is_set() and tokens > 1 and not engine.turn.is_mine:
                until(lambda: writing.count >= begin + 2 or writing.count == 60)
            with honest(tokens):
                yield

        engine.passing = after_two_steps  # type: ignore[method-assign]

        def first() -> Any:
            found = model.generate(ids[0], **given, **new[0])
            ended.set()
            return found

        def second() -> Any:
            until(lambda: slots_of(model) and slots_of(model)[0].taken)
            return model.generate(ids[1], **given, **new[1], logits_processor=[writing])

        def third() -> Any:
            until(ended.is_set)
            return model.generate(ids[2], **given, **new[2])

        assert_same(together([first, second, third]), wanted)
        assert_all_shared(model)


def test_an_error_an_end_or_a_cancelled_call_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "OFTEN", 0)  # steps of all numbers of rows
    model, switch = build("mistral"), threading.Event()
    prompts = [prompt(1, 7, seed=place) for place in range(5)]
    wanted = [stock("mistral").generate(ids, **NEW, do_sample=False) for ids in prompts]

    def cancelled() -> Any:
        with cancellable(switch):
            return model.generate(prompts[2], **NEW, do_sample=False, logits_processor=[Steps(4, switch.set)])

    with sharing(model, 5) as engine:
        calls: list[Any] = [lambda ids=ids: model.generate(ids, **NEW, do_sample=False) for ids in prompts]
        honest = list(calls)
        calls[1] = lambda: model.generate(prompts[1], **NEW, do_sample=False, logits_processor=[Steps(5, fail)])
        calls[2] = cancelled
        calls[3] = lambda: model.generate(prompts[3], do_sample=False, pad_token_id=0, max_new_tokens=3)
        found = together(calls)
        assert str(found[1]) == "mine alone"
        assert isinstance(found[2], hf_accel.CancelledCallError)
        assert torch.equal(found[3], wanted[3][:, :10])
        assert_same([found[place] for place in (0, 4)], [wanted[place] for place in (0, 4)])
        assert_all_shared(model)
        (slot,) = slots_of(model)
        assert slot.place_for(slot.rows) == 0, "all rows are free again"
        # and they are used again
        wait_for_one_another(engine, 5)
        assert_same(together(honest), wanted)
        assert slots_of(model) == [slot]
        assert 8 in slot.firsts, "fewer rows where the highest that goes on is lower"
        assert set(slot.firsts) <= {1, 2, 4, 8}
        assert_all_shared(model)


def cache_of(found: Any) -> Any:
    return next(value for value in found.values() if hasattr(value, "layers"))


def assert_same_caches(found: list[Any], wanted: list[Any]) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.sequences, want.sequences)
        for one, other in zip(cache_of(got).layers, cache_of(want).layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_kept_stays_as_it_was() -> None:
    """While others write on beside its rows, and when these are given to another call."""
    model = build("llama")
    kept: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    cases = [(prompt(1, 8 + place, seed=place), 4 + 8 * place) for place in range(3)]
    wanted = [stock("llama").generate(ids, max_new_tokens=count, **kept) for ids, count in cases]
    with sharing(model, 3) as engine:
        calls = [lambda ids=ids, new=new: model.generate(ids, max_new_tokens=new, **kept) for ids, new in cases]
        found = together(calls)
        assert_same_caches(found, wanted)
        wait_for_one_another(engine, 5)
        assert_same(together(calls_of(model)), texts_of("llama"))
        assert_all_shared(model)
        assert_same_caches(found, wanted)
        # and one of them can be continued
        texts = [
            target.generate(torch.cat([own.sequences, prompt(tokens=3)], dim=1), past_key_values=cache_of(own), **NEW)
            for target, own in ((model, found[2]), (stock("llama"), wanted[2]))
        ]
        assert_same(texts[:1], texts[1:])
    assert_same_caches(found[:2], wanted[:2])


def test_longer_calls_have_longer_rows() -> None:
    """Calls whose rows lie in buffers of different length go each at their own steps; new ones go where all fit."""
    model = build("llama")
    ids = [prompt(1, size, seed=size) for size in (6, 9)]
    stops: dict[str, Any] = {"stopping_criteria": [lambda ids, scores: ids.shape[1] > 20]}
    given = {"do_sample": False, "pad_token_id": 0}
    wanted = [stock("llama").generate(each, **given, max_new_tokens=12) for each in ids]
    with sharing(model, max_wait_ms=50.0) as engine:
        wait_for_one_another(engine, 2)
        calls = [
            lambda: model.generate(ids[0], **given, max_new_tokens=12),
            lambda: model.generate(ids[1], **given, max_new_tokens=300, **stops),
        ]
        assert_same(together(calls), [wanted[0], wanted[1]])
        assert {slot.capacity for slot in slots_of(model)} <= {256, 1024}
        wait_for_one_another(engine, 1)
        assert_same([calls[0]()], wanted[:1])
        assert_all_shared(model)
        longest = next(slot for slot in slots_of(model) if slot.capacity == 1024)
        assert longest.on_device[0] >= 6 + 11, "the latest call had rows of the longer ones"


@pytest.mark.parametrize("fields", [{"max_rows": 2}, {"max_tokens": 600}])
def test_calls_wait_for_rows(fields: dict[str, int]) -> None:
    model = build("llama")
    prompts = [prompt(1, 5 + place, seed=place) for place in range(5)]
    wanted = [stock("llama").generate(ids, **NEW, do_sample=False) for ids in prompts]
    with sharing(model, max_wait_ms=20.0, **fields):
        assert_same(together([lambda ids=ids: model.generate(ids, **NEW, do_sample=False) for ids in prompts]), wanted)
        assert_all_shared(model)
        assert joined(model)["most_rows"] <= 2
        assert [slot.rows for slot in slots_of(model)] == [2]


def test_a_call_alone_goes_from_replay_to_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, follow = build("llama"), JointSteps.follow
    followed: list[bool] = []

    def noted(self: Any, cache: Any) -> Any:
        found = follow(self, cache)
        followed.append(found is not None)
        return found

    monkeypatch.setattr(JointSteps, "follow", noted)
    wanted = stock("llama").generate(prompt(), max_new_tokens=30, do_sample=False, pad_token_id=0)
    with sharing(model, alone=True):
        assert torch.equal(model.generate(prompt(), max_new_tokens=30, do_sample=False, pad_token_id=0), wanted)
        assert_all_shared(model)
        assert compiled(model)["replays"] == 29
    assert sum(followed) == 28


def test_after_the_block_calls_have_slots_of_their_own() -> None:
    model = build("llama")
    ids, given = prompt(), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    wanted = stock("llama").generate(ids, **given)
    with captures_here(), hf_accel.optimized(model, STEPS):
        assert torch.equal(model.generate(ids, **given), wanted)
        before = compiled(model)
        for _ in range(2):
            with hf_accel.serving(model):
                assert torch.equal(model.generate(ids, **given), wanted)
                assert compiled(model)["buffer_bytes"] > before["buffer_bytes"]
            assert compiled(model)["buffer_bytes"] == before["buffer_bytes"]
            replays = compiled(model)["replays"]
            assert torch.equal(model.generate(ids, **given), wanted)
            assert compiled(model)["replays"] == replays + 19
            assert slots_of(model) == []


def test_drafts_run_beside_one_call_after_the_other() -> None:
    model = build("llama")
    drafts: dict[str, Any] = {"speculative": SpeculativeConfig(drafter="lookup", adaptive=False)}
    prompts = [prompt(1, 6 + place, seed=place) for place in range(4)]
    given = {"max_new_tokens": 25, "pad_token_id": 0, "do_sample": False}
    wanted = [stock("llama").generate(ids, **given) for ids in prompts]
    with sharing(model, max_wait_ms=20.0):
        calls = [
            lambda ids=ids, own=own: model.generate(ids, **given, **own)
            for ids, own in zip(prompts, ({}, drafts, {}, drafts), strict=True)
        ]
        assert_same(together(calls), wanted)
        counts, found = joined(model), compiled(model)
        assert counts["joined"] == 2
        assert list(counts["alone"].values()) == [2]
        assert "drafts" in next(iter(counts["alone"]))
        assert (found["eager_steps"], found["calls_without_buffers"]) == ({}, {})


def test_a_call_within_a_call_has_a_slot_of_its_own() -> None:
    model = build("llama")
    ids, inner = prompt(), []
    wanted = stock("llama").generate(ids, **NEW, do_sample=False)
    with sharing(model, 2):
        ask = Steps(3, lambda: inner.append(model.generate(ids, **NEW, do_sample=False)))
        calls = [
            lambda: model.generate(ids, **NEW, do_sample=False, logits_processor=[ask]),
            lambda: model.generate(ids, **NEW, do_sample=False),
        ]
        assert_same(together(calls) + inner, [wanted] * 3)
        assert_all_shared(model)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_capture_that_fails_leaves_steps_eager_and_merged(name: str) -> None:
    model = build(name)
    with sharing(model, 5):
        host: Any = host_of(model)
        type(host.doors[Door.FORWARD]._inner.capture).fails = RuntimeError("no such operation")
        assert_same(together(calls_of(model)), texts_of(name))
        (reason,) = compiled(model)["eager_steps"]
        assert "no such operation" in reason
        assert joined(model)["rows_per_step"] > 2
