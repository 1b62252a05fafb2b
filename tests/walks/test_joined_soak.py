"""Calls of every kind that join and leave at random, end early, raise and are cancelled, so many or for so long.

HF_ACCEL_SOAK_MINUTES lets it run for as long; the default is a thousand calls.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import threading
import time
from typing import Any

import pytest
import torch
from catalogue import exact
from models import build, padded, prompt

import hf_accel
from hf_accel import CancelledCallError, KVCacheConfig
from hf_accel.core.calls.cancelling import cancellable

NAME, CALLERS = "llama", 8
INPUTS = [
    {"input_ids": prompt(1, 70, 1)},
    {"input_ids": prompt(1, 5, 2)},
    padded([40, 17, 3], 3),
    padded([4, 9], 4),
    {"input_ids": prompt(1, 190, 5)},
]
ASKED: list[dict[str, Any]] = [
    {},
    {},
    {"do_sample": True, "seed": 1},
    {"do_sample": True, "top_k": 12, "top_p": 0.9, "seed": 2},
    {"repetition_penalty": 1.3},
    {"eos_token_id": list(range(20, 50)), "pad_token_id": 3},
    {"num_beams": 2},
    {"speculative": "lookup"},
    {"kv_cache": KVCacheConfig(bits=8)},
    {"kv_cache": KVCacheConfig(prefix_reuse=True), "tenant": "one"},
    {"kv_cache": KVCacheConfig(store="cpu")},
]


def text(model: Any, place: int, way: int, tokens: int, **others: Any) -> torch.Tensor:
    given = {"do_sample": False} | ASKED[way] | others
    return model.generate(**INPUTS[place], **given, max_new_tokens=tokens)  # type: ignore[no-any-return]


def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("mine alone")


class Soak:
    """Random calls by several threads; each text is compared with that of the same call alone."""

    def __init__(self, model: Any, calls: int, minutes: float) -> None:
        self.model, self.calls, self.end = model, calls, time.monotonic() + 60 * minutes if minutes else None
        self.made = 0
        self.wrong: list[Any] = []
        self.lock = threading.Lock()

    def goes_on(self) -> bool:
        with self.lock:
            self.made += 1
            return not self.wrong and (self.made <= self.calls if self.end is None else time.monotonic() < self.end)

    def caller(self, seed: int) -> None:
        picks = random.Random(seed)
        try:
            while self.goes_on():
                self.call(picks)
        except BaseException as error:
            self.wrong.append(error)

    def call(self, picks: random.Random) -> None:
        asked = picks.randrange(len(INPUTS)), picks.randrange(len(ASKED)), picks.choice((1, 4, 9, 24))
        fate = picks.random()
        if fate < 0.1:
            with pytest.raises(RuntimeError, match="mine alone"):
                text(self.model, *asked, logits_processor=[fail])
        elif fate < 0.2:
            switch = threading.Event()
            timer = threading.Timer(picks.random() * 0.02, switch.set)
            timer.start()
            try:
                with cancellable(switch):
                    assert torch.equal(text(self.model, *asked), EXPECTED(*asked)), asked
            except CancelledCallError:
                pass
            timer.join()
        else:
            assert torch.equal(text(self.model, *asked), EXPECTED(*asked)), asked
        if picks.random() < 0.3:
            time.sleep(picks.random() * 0.01)


EXPECTED: Any = None


def caches() -> list[Any]:
    """Return the caches of this process."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x).__name__ == "DynamicCache"]


def run(calls: int, minutes: float = 0.0) -> None:
    """Make the calls; afterwards nobody is inside, and no thread and no cache is left."""
    global EXPECTED
    twin, model = build(NAME), build(NAME)
    hf_accel.optimize(twin, exact(twin))
    EXPECTED = functools.lru_cache(None)(functools.partial(text, twin))
    for place in range(len(INPUTS)):
        for way in range(len(ASKED)):
            for tokens in (1, 4, 9, 24):
                EXPECTED(place, way, tokens)
    hf_accel.optimize(model, exact(model))
    before, others = threading.active_count(), caches()
    with hf_accel.serving(model, max_rows=6, max_tokens=1200, chunk_tokens=64):
        engine, report = type(model)._hf_accel_engine, hf_accel.report(model).joined_calls
        picks = random.Random(0)
        engine.pace.merges = lambda calls: picks.random() < 0.9  # mostly, whatever times say
        soak = Soak(model, calls, minutes)
        threads = [threading.Thread(target=soak.caller, args=(seed,)) for seed in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if soak.wrong:
            raise soak.wrong[0]
        assert (engine.admission.rows, engine.admission.tokens, engine.meeting.writers) == (0, 0, 0)
        assert not engine.meeting._waiting
        assert not engine.turn._waiting
        assert report.most_rows > 3
        assert report.joined > 0.4 * soak.made
        assert not any("failed" in reason for reason in report.alone), report  # a pass that fails is made again, alone
        print(report)
    made = [cache for cache in caches() if not any(cache is other for other in others)]
    assert threading.active_count() <= before  # threads of other tests may end meanwhile
    assert not any(cache.layers and cache.get_seq_length() for cache in made)


def test_a_hundred_random_joins_and_leaves() -> None:
    run(100)


@pytest.mark.slow
def test_a_thousand_random_joins_and_leaves() -> None:
    run(1000, float(os.environ.get("HF_ACCEL_SOAK_MINUTES", 0)))
