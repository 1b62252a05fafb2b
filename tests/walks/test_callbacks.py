"""A callback that raises ends the call as it ends stock's, and leaves nothing behind: the next call is stock's again.

Every callback, at the first, the second and a later call of it, x every way through the token loop and the cache, x one
row and two. The error that arrives is the object that was raised; the caller's cache and the random numbers stand where
stock leaves them; no thread, no file and no count is left over.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from typing import Any

import pytest
import torch
from catalogue import exact
from comparison import assert_same_cache
from models import build, padded, prompt
from raising import CALLBACKS, GIVEN, Raised, raising
from speculating import always
from transformers import DynamicCache

import hf_accel
from hf_accel import KVCacheConfig
from hf_accel.core.drift import CACHE
from hf_accel.decoding.loop import TokenLoop

NAME = "llama"
TIERED = KVCacheConfig(store="disk", cpu_budget_bytes=0)
# name -> whether the text is stock's, a config that drafts, and arguments of the call
WAYS: dict[str, tuple[bool, Any, dict[str, Any]]] = {
    "plain": (True, None, {}),
    "lookup": (True, always("lookup"), {}),
    "self": (True, always("self"), {}),
    "8 bits": (False, None, {"kv_cache": KVCacheConfig(bits=8)}),
    "disk": (True, None, {"kv_cache": TIERED}),
    "prefixes": (True, None, {"kv_cache": KVCacheConfig(prefix_reuse=True)}),
    "eviction": (False, None, {"kv_cache": KVCacheConfig(window=8, sinks=2)}),
    "drafts over 8 bits": (False, always("lookup"), {"kv_cache": KVCacheConfig(bits=8)}),
}
# where stock's steps are made one by one, what was drawn and written until the error is defined
STEPWISE = {"plain"}
ERRORS: dict[str, type[BaseException]] = {"Raised": Raised, "KeyboardInterrupt": KeyboardInterrupt}
CALL = {"max_new_tokens": 10, "do_sample": True, "top_k": 30}


@functools.cache
def stock() -> Any:
    return build(NAME)


@functools.cache
def optimised(way: str) -> Any:
    model, drafts = build(NAME), WAYS[way][1]
    return hf_accel.optimize(model, [*exact(model), *([drafts] if drafts else [])])


def inputs(rows: int) -> dict[str, Any]:
    return {"input_ids": prompt(1, 40)} if rows == 1 else padded([40, 23])


def generate(model: Any, rows: int, **arguments: Any) -> Any:
    torch.manual_seed(4)
    return model.generate(**inputs(rows), **CALL, **arguments)


def left_open() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@functools.cache
def undisturbed(way: str, rows: int) -> torch.Tensor:
    """Return the text of the call without callbacks, of stock itself where the way is exact."""
    found = generate(optimised(way), rows, **WAYS[way][2])
    if WAYS[way][0]:
        assert torch.equal(found, generate(stock(), rows))
    return found


def failing(model: Any, callback: str, step: int, error: BaseException, rows: int, **arguments: Any) -> Any:
    """Make the call whose callback raises; return what arrived, the random state, and the text if none arrived."""
    with raising(callback, model, step, error) as given:
        try:
            text, arrived = generate(model, rows, **given, **arguments), None
        except (Raised, KeyboardInterrupt, ValueError) as raised:
            text, arrived = None, raised
            raised.__traceback__ = None  # whose frames hold the call's cache
    return arrived, torch.get_rng_state(), text


def check(way: str, callback: str, step: int, kind: str, rows: int) -> None:
    model, (_, drafts, arguments) = optimised(way), WAYS[way]
    expected, before, counted = undisturbed(way, rows), left_open(), hf_accel.report(model).to_dict()["calls"]
    caches = [DynamicCache(config=stock().config) for _ in range(2)] if way in STEPWISE else []
    own = [{CACHE: cache} for cache in caches] or [{}, {}]
    errors = [ERRORS[kind]("on purpose") for _ in range(2)]
    theirs = failing(stock(), callback, step, errors[0], rows, **own[0])
    ours = failing(model, callback, step, errors[1], rows, **own[1], **arguments)

    if theirs[0] is errors[0] and (drafts is None or ours[0] is not None):
        assert ours[0] is errors[1], f"{ours[0]!r} arrived"
    elif theirs[0] is not None and drafts is None:  # such as stock's own: a streamer takes one row
        assert type(ours[0]) is type(theirs[0])
        assert str(ours[0]) == str(theirs[0])
    if way in STEPWISE:
        assert torch.equal(ours[1], theirs[1]), "another number of random draws"
        assert_same_cache(*caches)
    if left_open() != before:
        gc.collect()
    assert left_open() == before, "a thread or a file is left over"
    after = hf_accel.report(model).to_dict()["calls"]
    failed = ours[0] is not None
    assert after["served"] + after["delegated"] == counted["served"] + counted["delegated"] + (not failed)
    assert torch.equal(generate(model, rows, **arguments), expected), "the next call is another one"


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_a_callback_arrives_and_leaves_nothing(way: str, callback: str) -> None:
    rows = 1 if "streamer" in callback else 2
    check(way, callback, 1 if callback in GIVEN and callback != "streamer end" else 0, "Raised", rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("way", WAYS)
def test_errors_at_every_step(way: str, callback: str, kind: str, rows: int) -> None:
    for step in (0, 1, 2, 5, 9, 12):
        check(way, callback, step, kind, rows)


def wrapped(patch: pytest.MonkeyPatch) -> None:
    run = TokenLoop.run

    def wrong(self: Any, call: Any) -> Any:
        try:
            return run(self, call)
        except Exception as error:
            raise RuntimeError(str(error)) from error

    patch.setattr(TokenLoop, "run", wrong)


def with_a_draw_more(patch: pytest.MonkeyPatch) -> None:
    run = TokenLoop.run

    def wrong(self: Any, call: Any) -> Any:
        try:
            return run(self, call)
        except Exception:
            torch.rand(1)
            raise

    patch.setattr(TokenLoop, "run", wrong)


def with_a_file_left_open(patch: pytest.MonkeyPatch) -> None:
    run, left = TokenLoop.run, []

    def wrong(self: Any, call: Any) -> Any:
        left.append(open(os.devnull))  # noqa: SIM115
        found = run(self, call)
        left.pop().close()
        return found

    patch.setattr(TokenLoop, "run", wrong)


def with_a_cache_cleared(patch: pytest.MonkeyPatch) -> None:
    run = TokenLoop.run

    def wrong(self: Any, call: Any) -> Any:
        try:
            return run(self, call)
        except Exception:
            call.model_kwargs[CACHE].reset()
            raise

    patch.setattr(TokenLoop, "run", wrong)


@pytest.mark.parametrize("defect", [wrapped, with_a_draw_more, with_a_file_left_open, with_a_cache_cleared])
def test_a_planted_defect_is_seen(defect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        defect(patch)
        with pytest.raises((AssertionError, RuntimeError)):
            check("plain", "processor", 1, "Raised", 2)
    check("plain", "processor", 1, "Raised", 2)
