"""Threads that generate on one optimised model all the time, each its own kind of call, while others are set up.

Every text is that of the same call alone: stock's where the call is exact. Beside the callers, one thread optimises and
restores models of its own again and again.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import exact
from models import build, padded, prompt
from speculating import always

import hf_accel
from hf_accel import KVCacheConfig
from hf_accel.core.calls import hosting

NAME = "llama"
CALLERS = 4
REUSING, WINDOW = KVCacheConfig(prefix_reuse=True), KVCacheConfig(window=8, sinks=1)
# name -> is it exact, what is asked, what only an optimised model understands
ASKED: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "greedy": (True, {}, {}),
    "beams": (True, {"num_beams": 2}, {}),
    "stops early": (True, {"eos_token_id": list(range(20, 50)), "pad_token_id": 3}, {}),
    "lookup": (True, {}, {"speculative": "lookup"}),
    "self": (True, {}, {"speculative": always("self")}),
    "no drafts": (True, {}, {"speculative": False}),
    "tenant": (True, {}, {"kv_cache": REUSING, "tenant": "one"}),
    "other tenant": (True, {}, {"kv_cache": REUSING, "tenant": "other", "speculative": "lookup"}),
    "disk": (True, {}, {"kv_cache": KVCacheConfig(store="disk", cpu_budget_bytes=0)}),
    "8 bits": (False, {}, {"kv_cache": KVCacheConfig(bits=8)}),
    "window": (False, {}, {"kv_cache": WINDOW}),
}
INPUTS = [{"input_ids": prompt(1, 70, 1)}, {"input_ids": prompt(1, 5, 2)}, padded([40, 17, 3], 3)]
OTHERS = ["qwen2", "gpt2", "gemma3"]


def text(model: Any, inputs: dict[str, Any], *arguments: dict[str, Any]) -> torch.Tensor:
    joined = {name: value for given in arguments for name, value in given.items()}
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, **joined)  # type: ignore[no-any-return]


@functools.cache
def other(name: str) -> tuple[Any, torch.Tensor]:
    model = build(name)
    return model, text(model, INPUTS[2])


def set_up_others(picks: random.Random) -> None:
    """Optimise another model, use it, and restore it."""
    name = picks.choice(OTHERS)
    model, expected = build(name), other(name)[1]
    hf_accel.optimize(model, exact(model, speculates=True))
    assert torch.equal(text(model, INPUTS[2]), expected), name
    hf_accel.restore(model)
    assert torch.equal(text(model, INPUTS[2]), expected), f"{name}, restored"


def soak(seconds: float) -> tuple[int, list[BaseException]]:
    """Return how many calls were made, and what went wrong."""
    stock, model = build(NAME), build(NAME)
    hf_accel.optimize(model, [*exact(model), always("lookup")])
    expected = {}
    for name, (is_exact, asked, own) in ASKED.items():
        for index, inputs in enumerate(INPUTS):
            alone = text(stock, inputs, asked) if is_exact else text(model, inputs, asked, own)
            expected[name, index] = alone
    for name in OTHERS:
        other(name)
    end, count, faults = time.monotonic() + seconds, [0] * (CALLERS + 1), []

    def work(number: int, step: Callable[[random.Random], None]) -> None:
        picks = random.Random(number)
        try:
            torch.set_num_threads(1)  # of this thread
            while time.monotonic() < end and not faults:
                step(picks)
                count[number] += 1
        except BaseException as fault:
            faults.append(fault)

    def call(picks: random.Random) -> None:
        name, index = picks.choice([*ASKED]), picks.randrange(len(INPUTS))
        _, asked, own = ASKED[name]
        found = text(model, INPUTS[index], asked, own)
        assert torch.equal(found, expected[name, index]), f"{name}, inputs {index}: {found.tolist()}"

    steps = [call] * CALLERS + [set_up_others]
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not faults:
        assert hf_accel.report(model).to_dict()["calls"]["served"] > 0
        hf_accel.restore(model)
        assert torch.equal(text(model, INPUTS[0]), expected["greedy", 0])
    return sum(count), faults


def check(seconds: float) -> None:
    count, faults = soak(seconds)
    if faults:
        raise faults[0]
    assert count > CALLERS


def test_threads_write_what_each_call_writes_alone() -> None:
    check(4.0)


@pytest.mark.slow
def test_threads_write_what_each_call_writes_alone_for_minutes() -> None:
    check(120.0)


class OneForAll:
    """A context variable that all threads share."""

    def __init__(self) -> None:
        self.value: Any = None

    def set(self, value: Any) -> Any:
        before, self.value = self.value, value
        return before

    def get(self) -> Any:
        return self.value

    def reset(self, before: Any) -> None:
        self.value = before


def test_a_request_shared_by_threads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "IN_PROGRESS", OneForAll())
    assert soak(20.0)[1], "the planted defect went unseen"
