"""Concurrent calls that join in one batch: each gets the text that it gets alone."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from capturing import captures_here
from catalogue import exact
from models import NAMES, build, padded, prompt

import hf_accel
from hf_accel.batching.engine import ONE_CALL
from hf_accel.batching.merged import MergedLayer
from hf_accel.compilation import blocks, runner
from hf_accel.core.calls.cancelling import cancellable


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Return what each call gives, or the error it raises, all made at the same time by threads."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(place: int) -> None:
        start.wait()
        try:
            results[place] = calls[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads)
    return results


@contextmanager
def optimised(model: Any, joining: int = 0, **fields: Any) -> Any:
    """Optimise a model, and let its calls join: so many wait for one another, and meet whatever the machine does."""
    with hf_accel.optimized(model, exact(model)), hf_accel.serving(model, **({"max_wait_ms": 2000.0} | fields)):
        engine = type(model)._hf_accel_engine  # type: ignore[attr-defined]
        engine._goes_alone = lambda: False
        if joining:
            everybody, join = threading.Barrier(joining), engine.meeting.join
            engine.meeting.join = lambda: (join(), everybody.wait(20))
        yield hf_accel.report(model).joined_calls


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    for got, want in zip(found, wanted, strict=True):
        if isinstance(got, BaseException):
            raise got
        assert torch.equal(got, want)


NEW = {"max_new_tokens": 12, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "longer": {"do_sample": False, "max_new_tokens": 17},
    "sampled": {"do_sample": True, "temperature": 1.3, "seed": 3},
    "top-k": {"do_sample": True, "top_k": 9, "top_p": 0.8, "seed": 4},
    "penalty": {"do_sample": False, "repetition_penalty": 1.4},
}


def alone(model: Any, arguments: dict[str, Any], ids: torch.Tensor, **others: Any) -> torch.Tensor:
    """Return the text that stock writes, which takes its seed from torch."""
    given = dict(arguments)
    if (seed := given.pop("seed", None)) is not None:
        torch.manual_seed(seed)
    found: torch.Tensor = model.generate(ids, **(NEW | given | others))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_call_gets_the_text_that_it_gets_alone(name: str) -> None:
    model = build(name)
    prompts = [prompt(1, tokens, seed=tokens) for tokens in (5, 19, 11, 30, 8)]
    wanted = [alone(model, way, ids) for way, ids in zip(WAYS.values(), prompts, strict=True)]
    with optimised(model, len(WAYS)) as report:
        calls = [
            lambda ids=ids, way=way: model.generate(ids, **(NEW | way))
            for way, ids in zip(WAYS.values(), prompts, strict=True)
        ]
        assert_same(together(calls), wanted)
        assert report.joined == report.most_rows == len(WAYS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_calls_of_several_padded_rows_join(name: str) -> None:
    model, cases = build(name), ([9, 4, 7], [3], [12, 12], [5, 20])
    batches = [padded(lengths, seed=len(lengths)) for lengths in cases]
    wanted = [model.generate(**batch, **NEW, do_sample=False) for batch in batches]
    with optimised(model, len(cases)) as report:
        calls = [lambda batch=batch: model.generate(**batch, **NEW, do_sample=False) for batch in batches]
        assert_same(together(calls), wanted)
        assert report.most_rows == sum(map(len, cases))


CACHES = [
    hf_accel.KVCacheConfig(bits=8),
    hf_accel.KVCacheConfig(bits=4),
    hf_accel.KVCacheConfig(store="cpu"),
    hf_accel.KVCacheConfig(eviction="snapkv", kept_tokens=16, window=4),
    None,
]


@pytest.mark.parametrize("lengths", [(20,), (20, 11)], ids=["one row", "padded rows"])
def test_every_call_keeps_its_own_cache(lengths: tuple[int, ...]) -> None:
    model = build("llama")
    asked: list[dict[str, Any]] = [
        {**padded([length + place for length in lengths], place), **NEW, "do_sample": False}
        | ({} if cache is None else {"kv_cache": cache})
        for place, cache in enumerate(CACHES)
    ]
    with hf_accel.optimized(model, exact(model)):
        wanted = [model.generate(**given) for given in asked]
    with optimised(model, len(CACHES)) as report:
        assert_same(together([lambda given=given: model.generate(**given) for given in asked]), wanted)
        assert report.joined == len(CACHES)
        assert report.most_rows == len(CACHES) * len(lengths)
        assert not report.alone


def test_streamers_processors_and_criteria_stay_with_their_call() -> None:
    model = build("qwen2")

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.thread: int | None = None

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()
            self.thread = threading.get_ident()

        def end(self) -> None:
            self.tokens.append(-1)

    def forbid(token: int) -> Any:
        return lambda ids, scores: scores.index_fill(1, torch.tensor([token]), -1e9)

    prompts = [prompt(1, 6 + place, seed=place) for place in range(4)]
    options = [
        {"logits_processor": [forbid(place)], "stopping_criteria": [lambda ids, scores, n=place: ids.shape[1] > 10 + n]}
        for place in range(4)
    ]
    wanted, heard = [], []
    for ids, option in zip(prompts, options, strict=True):
        streamer = Streamer()
        wanted.append(model.generate(ids, **NEW, **option, streamer=streamer, do_sample=False))
        heard.append(streamer.tokens)
    with optimised(model, 4) as report:
        streamers = [Streamer() for _ in prompts]
        threads: list[int] = []

        def call(place: int) -> torch.Tensor:
            threads.append(threading.get_ident())
            return model.generate(prompts[place], **NEW, **options[place], streamer=streamers[place], do_sample=False)

        assert_same(together([lambda place=place: call(place) for place in range(4)]), wanted)
        assert [streamer.tokens for streamer in streamers] == heard
        assert {streamer.thread for streamer in streamers} == set(threads)
        assert report.joined == report.most_rows == 4


def test_an_error_or_an_end_of_one_call_changes_no_other() -> None:
    model = build("mistral")
    prompts = [prompt(1, 7, seed=place) for place in range(5)]
    wanted = [model.generate(ids, **NEW, do_sample=False) for ids in prompts]

    def fail(ids: torch.Tensor, scores: Any) -> Any:
        if ids.shape[1] > 10:
            raise RuntimeError("mine alone")
        return scores

    with optimised(model, 5) as report:
        calls = [lambda ids=ids: model.generate(ids, **NEW, do_sample=False) for ids in prompts]
        calls[1] = lambda: model.generate(prompts[1], **NEW, do_sample=False, logits_processor=[fail])
        calls[3] = lambda: model.generate(prompts[3], do_sample=False, pad_token_id=0, max_new_tokens=3)
        found = together(calls)
        assert isinstance(found[1], RuntimeError)
        assert str(found[1]) == "mine alone"
        assert torch.equal(found[3], wanted[3][:, :10])
        assert_same([found[place] for place in (0, 2, 4)], [wanted[place] for place in (0, 2, 4)])
        assert report.joined == report.most_rows == 5
        engine = type(model)._hf_accel_engine
        assert engine.admission.rows == engine.admission.tokens == engine.meeting.writers == 0


def test_whoever_runs_a_step_may_be_cancelled_in_it_without_harm_to_the_others() -> None:
    model = build("llama")
    ids = prompt(1, 9)
    wanted = model.generate(ids, **NEW, do_sample=False)
    switches: dict[int, threading.Event] = {}

    def call() -> Any:
        switch = switches[threading.get_ident()] = threading.Event()
        with cancellable(switch):
            return model.generate(ids, **NEW, do_sample=False)

    # without native layers, so that the step of all is a pass of the model
    plain = [hf_accel.AttentionConfig(), hf_accel.KVCacheConfig(), hf_accel.DecodingConfig()]
    with hf_accel.optimized(model, plain), hf_accel.serving(model, max_wait_ms=2000.0):
        engine = type(model)._hf_accel_engine  # type: ignore[attr-defined]
        engine._goes_alone = lambda: False
        everybody, join, run = threading.Barrier(4), engine.meeting.join, engine.run
        engine.meeting.join = lambda: (join(), everybody.wait(20))

        def running(**inputs: Any) -> Any:
            if len(inputs["input_ids"]) == 4:
                switches[threading.get_ident()].set()
            return run(**inputs)

        engine.passes._run = running
        found = together([call] * 4)
        report = hf_accel.report(model).joined_calls.to_dict()
    assert sorted(type(got).__name__ for got in found) == ["CancelledCallError", *["Tensor"] * 3]
    assert_same([got for got in found if isinstance(got, torch.Tensor)], [wanted] * 3)
    assert report["alone"] == {}
    assert report["most_rows"] == 4


def test_what_cannot_join_runs_beside_the_batch_with_its_reason() -> None:
    model = build("llama")
    ids = prompt(1, 9)
    ways: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_beams": 2, "seed": 5},
        {"use_cache": False},
        {"speculative": hf_accel.SpeculativeConfig(drafter="lookup", adaptive=False)},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ]
    wanted = [alone(model, way, ids) if "speculative" not in way else alone(model, {}, ids) for way in ways]
    with optimised(model) as report:
        found = together([lambda way=way: model.generate(ids, **NEW, **way) for way in ways])
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))
        reasons = " ".join(report.to_dict()["alone"])
        assert "no cache" in reasons
        assert "drafts" in reasons
        assert "beam search" in str(hf_accel.report(model))


def test_hooked_modules_see_their_call_alone() -> None:
    model = build("llama")
    ids = prompt(1, 9)
    wanted = model.generate(ids, **NEW, do_sample=False)
    with optimised(model) as report:
        seen: list[int] = []
        hook = model.model.layers[1].register_forward_hook(lambda m, args, output: seen.append(len(args[0])))
        calls = [lambda: model.generate(ids, **NEW, do_sample=False)] * 3
        assert_same(together(calls), [wanted] * 3)
        hook.remove()
        assert set(seen) == {1}
        assert sum(report.to_dict()["alone"].values()) == 3


def test_hooks_that_come_in_the_middle_see_their_call_alone() -> None:
    model = build("llama")
    ids = prompt(1, 9)
    wanted = model.generate(ids, **NEW, do_sample=False)
    seen: list[int] = []
    hooks: list[Any] = []

    def begin(input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] == 13 and not hooks:
            layer = model.model.layers[1]
            hooks.append(layer.register_forward_hook(lambda m, args, output: seen.append(len(args[0]))))
        return scores

    with optimised(model, joining=3) as report:
        engine = type(model)._hf_accel_engine
        del engine._goes_alone  # as it is
        engine.pace.merges = lambda calls: True
        calls = [lambda: model.generate(ids, **NEW, do_sample=False, logits_processor=[begin])] * 3
        assert_same(together(calls), [wanted] * 3)
        assert report.most_rows == 3
    hooks[0].remove()
    assert set(seen) == {1}


def test_prompts_are_read_in_chunks_beside_others() -> None:
    model = build("gemma2")
    prompts = [prompt(1, tokens, seed=tokens) for tokens in (4, 150, 90)]
    new = [40, 6, 9]
    wanted = [
        model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        for ids, count in zip(prompts, new, strict=True)
    ]
    lengths: list[int] = []
    with optimised(model, chunk_tokens=32):
        engine = type(model)._hf_accel_engine
        noted = engine.pace.prompt
        engine.pace.prompt = lambda tokens, seconds: (lengths.append(tokens), noted(tokens, seconds))
        calls = [
            lambda ids=ids, count=count: model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
            for ids, count in zip(prompts, new, strict=True)
        ]
        assert_same(together(calls), wanted)
    assert lengths.count(30) >= 2  # 150 in five equal ones, 90 in three


def test_the_model_is_as_it_was_after_the_block() -> None:
    model = build("llama")
    ids, stock = prompt(1, 9), type(model)
    with hf_accel.optimized(model, exact(model)):
        kind, doors = type(model), hf_accel.core.calls.hosting.host_of(model).doors
        with hf_accel.serving(model):
            assert type(model) is not kind
            assert type(copy.deepcopy(model)) is stock  # copies are of the user's class
            model.generate(ids, **NEW)
        assert type(model) is kind
        assert hf_accel.core.calls.hosting.host_of(model).doors is doors
        assert hf_accel.report(model).joined_calls is None


def test_rows_that_have_ended_leave_the_batch_of_all() -> None:
    model = build("llama")
    batches = [padded([9, 4, 7], seed=1), padded([6, 11], seed=2), {"input_ids": prompt(1, 8)}]
    given = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": list(range(0, 128, 9)), "do_sample": False}
    wanted = [model.generate(**batch, **given) for batch in batches]
    with optimised(model, len(batches)) as report:
        calls = [lambda batch=batch: model.generate(**batch, **given) for batch in batches]
        assert_same(together(calls), wanted)
        assert report.most_rows == 6
        assert "left their batch" in str(hf_accel.report(model).rows_left)
    assert len({len(text[0]) for text in wanted}) > 1


def failing_once(update: Any) -> Any:
    """Return an `update` that fails in the fourth layer that it is called for, when some have taken states in."""
    calls = itertools.count(1)

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("no room")
        return update(self, *args, **kwargs)

    return wrong


def test_a_pass_that_fails_is_told_and_each_call_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2")
    prompts = [prompt(1, 7 + place, seed=place) for place in range(3)]
    wanted = [model.generate(ids, **NEW, do_sample=False) for ids in prompts]
    with optimised(model, 3) as report:
        monkeypatch.setattr(MergedLayer, "reserve", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(MergedLayer, "update", failing_once(MergedLayer.update))
        calls = [lambda ids=ids: model.generate(ids, **NEW, do_sample=False) for ids in prompts]
        assert_same(together(calls), wanted)
        assert any("no room" in reason for reason in report.to_dict()["alone"])
        assert not type(model)._hf_accel_engine.pace.merges(3)


def test_calls_that_cannot_share_captured_steps_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are compiled would be compiled for each number of rows."""
    monkeypatch.setattr(blocks, "BACK_END", "eager")
    monkeypatch.setattr(runner, "PAYS_BACK", 0)
    model = build("llama")
    ids = prompt(1, 9)
    wanted = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    began: list[int] = []
    with (
        captures_here(),
        hf_accel.optimized(
            model, [hf_accel.AttentionConfig(), hf_accel.DecodingConfig(), hf_accel.CompilationConfig(mode="compile")]
        ),
        hf_accel.serving(model),
    ):

        def call(number: int) -> torch.Tensor:
            def note(input_ids: Any, scores: Any) -> Any:
                began.append(number)
                return scores

            return model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, logits_processor=[note])

        assert_same(together([lambda number=number: call(number) for number in range(3)]), [wanted] * 3)
        assert hf_accel.report(model).joined_calls.to_dict()["alone"] == {ONE_CALL: 3}
        # nobody's steps are made without the capture because another call has the buffers
        found = hf_accel.report(model).compilation.to_dict()
        assert (found["eager_steps"], found["calls_without_buffers"]) == ({}, {})
    assert [number for number, _ in itertools.groupby(began)] == list(dict.fromkeys(began))
    assert len(began) == 90
