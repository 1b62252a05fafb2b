"""Greedy texts go from replay to replay: a token costs the host a launch and a few operations, the text is stock's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from capturing import captures_here
from comparison import assert_equal_calls
from models import build, prompt, stock
from test_generate import plain
from torch.utils._python_dispatch import TorchDispatchMode

import hf_accel
from hf_accel import AttentionConfig, CompilationConfig, DecodingConfig
from hf_accel.compilation.runner import StaticRunner
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of

FEW_OPERATIONS = 6  # per token, where nothing but the length ends the text
ENDS: dict[str, Any] = {"eos_token_id": list(range(20, 60)), "pad_token_id": 3}


def captured() -> Any:
    with captures_here():
        return hf_accel.optimize(build("llama"), [DecodingConfig(), AttentionConfig(), CompilationConfig()])


class Outside(TorchDispatchMode):
    """Counts operations, those of replays apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[bool] = Counter()
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[bool(self.replays)] += 1
        return func(*args, **(kwargs or {}))


def test_a_token_costs_the_host_few_operations() -> None:
    model = captured()
    outside, host = Outside(), host_of(model)
    assert host is not None
    runner: StaticRunner = host.doors[Door.FORWARD]
    model.generate(prompt(), max_new_tokens=40, do_sample=False)
    for slot in runner.slots._slots.values():
        for recorded in slot.graphs.values():

            def counted(replay: Any = recorded.replay) -> Any:
                outside.replays += 1
                try:
                    return replay()
                finally:
                    outside.replays -= 1

            recorded.replay = counted
    totals = []
    for tokens in (20, 40):
        outside.counts.clear()
        with outside:
            model.generate(prompt(), max_new_tokens=tokens, do_sample=False)
        totals.append(outside.counts[False])
    assert (totals[1] - totals[0]) / 20 <= FEW_OPERATIONS


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40},
        {"max_new_tokens": 40, **ENDS},
        {"max_new_tokens": 30, "return_dict_in_generate": True},
        {"max_new_tokens": 30, "min_new_tokens": 12, **ENDS},
        {"max_new_tokens": 30, "num_return_sequences": 1, "repetition_penalty": 1.3},
    ],
)
def test_the_text_is_stocks(options: dict[str, Any]) -> None:
    model = captured()
    for _ in range(2):  # the second call finds the buffers and the graph of the first
        assert_equal_calls(stock("llama"), model, plain(do_sample=False, **options))


def test_what_comes_between_is_seen() -> None:
    """Neither the cache of a call that is over nor another one is followed."""
    model = captured()
    host: Any = host_of(model)
    runner: StaticRunner = host.doors[Door.FORWARD]
    model.generate(prompt(), max_new_tokens=30, do_sample=False)
    assert runner._latest is not None
    cache = type("Held", (), {"layers": runner._latest[0].step.follows})()
    assert runner.follow(cache) is None, "the call is over"
    assert runner._latest is None
    other = type("Other", (), {"layers": []})()
    assert runner.follow(other) is None


def test_the_cache_that_is_returned_can_be_continued() -> None:
    """Positions and masks have caught up with the tokens that were taken in from replay to replay."""
    model = captured()
    call = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    ids = prompt()
    first = [each.generate(ids, **call) for each in (stock("llama"), model)]
    assert torch.equal(first[0].sequences, first[1].sequences)
    lengths = [found.get("past_key_values", None) or found.cache for found in first]
    assert lengths[0].get_seq_length() == lengths[1].get_seq_length()
