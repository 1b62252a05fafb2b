"""Concurrent calls that join in one batch: each gets the text that it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from catalogue import exact
from models import NAMES, build, prompt

import hf_accel


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

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return results


@contextmanager
def optimised(model: Any, **fields: Any) -> Any:
    """Optimise a model, and let its calls join: patiently, so that they meet whatever else the machine does."""
    with hf_accel.optimized(model, exact(model)), hf_accel.serving(model, **({"max_wait_ms": 2000.0} | fields)):
        yield hf_accel.report(model).batching


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
    with optimised(model) as report:
        calls = [
            lambda ids=ids, way=way: model.generate(ids, **(NEW | way))
            for way, ids in zip(WAYS.values(), prompts, strict=True)
        ]
        assert_same(together(calls), wanted)
        found = report.to_dict()
        assert found["joined"] + sum(found["alone"].values()) == len(WAYS)
        if found["joined"] > 1:
            assert found["most_rows"] > 1
