"""Random walks through the space of `generate` calls: the optimised model's outcome is always the stock model's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from space import NAMES, STRATEGIES, Request, compare, pair, perform, requests

import hf_accel

SHORT, LONG = 15, 300  # calls of each strategy on each model, by default and in the slow run


def walk(strategy: str, name: str, calls: int, **options: Any) -> None:
    settings(max_examples=calls, **options)(given(requests([name], [strategy]))(compare))()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_call_is_stocks(strategy: str, name: str) -> None:
    walk(strategy, name, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_calls_are_stocks(strategy: str, name: str) -> None:
    walk(strategy, name, LONG)


@settings(max_examples=40)
@given(requests(), st.integers(0, 3))
def test_errors_are_stocks_and_leave_the_model_working(request: Request, seed: int) -> None:
    """Impossible arguments fail as on the stock model, and the next call is right."""
    compare(
        request.__class__(**{**vars(request), "options": request.options | {"temperature": -1.0, "do_sample": True}})
    )
    compare(Request("llama", "greedy", ("111111111",), 5, seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["served", "beam", "assisted", "fails"])
def test_the_walk_reaches_every_kind_of_call(name: str, kind: str) -> None:
    """A space in which stock always fails, or nothing is served, would prove nothing."""
    patched = pair(name)[1]

    def reached(request: Request) -> bool:
        before = hf_accel.report(patched).to_dict()["calls"]
        try:
            perform(request, patched)
        except Exception:
            return kind == "fails"
        after = hf_accel.report(patched).to_dict()["calls"]
        new = {text for text, count in after["reasons"].items() if count != before["reasons"].get(text, 0)}
        return after["served"] > before["served"] if kind == "served" else any(kind in text for text in new)

    find(requests([name]), reached, settings=settings(max_examples=200, phases=[Phase.generate]))
