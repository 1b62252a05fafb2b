"""The governor where refused drafts leave tokens to be read again: what that costs is part of what drafts cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_governor import FLAT, Scripted, candidate, rich

from hf_accel.core.calls.drafting import Draft
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative.costs import RowCosts, StepCosts
from hf_accel.speculative.governor import ALLOWANCE_SHARE, ALLOWANCE_STEPS, Account, Reading, choose
from hf_accel.speculative.session import MOST_UNREAD, SpeculativeSession
from hf_accel.speculative.statistics import Statistics

SLOPED = RowCosts({1: 1.0, 32: 8.0})


@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=200),
    claimed=st.floats(0.0, 1.0),
    draft_s=st.floats(0.0, 0.7),
    high=st.floats(1.0, 32.0),
)
@example(counts=[0], claimed=0.9, draft_s=0.0, high=25.0)
def test_no_call_loses_more_than_is_allowed(counts: list[int], claimed: float, draft_s: float, high: float) -> None:
    """Whatever becomes of the drafts, what is left to be read again at the end of the call included."""
    account, costs = Account(), StepCosts(RowCosts({1: 1.0, 64: 1 + (high - 1) * 63 / 31}), 1)
    spent = brought = 0.0
    unread = 0
    for accepted in counts:
        tokens = choose([[claimed] * 8], draft_s, costs, account, 8, Reading(unread, True)).tokens
        cost, taken = tokens * draft_s + costs.step(tokens + 1 + unread), min(accepted, tokens)
        account.settle(cost, 1.0 + taken)
        unread = 0 if taken == tokens else unread + 1 + taken
        spent, brought = spent + cost, brought + 1 + taken
        left = costs.step(1 + unread) - costs.step(1)
        assert spent + left - brought <= ALLOWANCE_STEPS + ALLOWANCE_SHARE * spent + 1e-9


def test_fewer_drafts_pay_where_they_are_forgotten() -> None:
    costs = StepCosts(SLOPED, 1)
    plain = choose([[0.6] * 8], 0.0, costs, rich(), 8)
    forgetful = choose([[0.6] * 8], 0.0, costs, rich(), 8, Reading(0, True))
    assert 0 < forgetful.tokens <= plain.tokens
    assert forgetful.rate < plain.rate


def session(states: Any, rows: RowCosts = FLAT) -> Any:
    text = Rows(torch.arange(6)[None], None, 100)
    found = [candidate("a", Scripted([4] * 9))]
    made: Any = SpeculativeSession(found, text, StepCosts(rows, 1), 6, True, Statistics(), lambda: None, states)
    made.account = rich()
    return made


def test_what_is_read_again_is_booked_and_counted_as_rows() -> None:
    states = SimpleNamespace(unread=0, recall=SimpleNamespace(reread=0))
    made = session(states, SLOPED)
    made.observe(None, [0], 1.0)
    before = made.account.lost
    states.recall.reread = 4
    made.observe(None, [0], SLOPED.at(5))
    assert made.account.lost == pytest.approx(before + SLOPED.at(5) - 1)
    assert made.costs.step(1) == pytest.approx(1.0), "a step that read others again is no plain one"


def test_nothing_is_drafted_where_much_is_to_be_read_again() -> None:
    states = SimpleNamespace(unread=MOST_UNREAD, recall=SimpleNamespace(reread=0))
    made = session(states)
    made.adaptive = False
    assert made.propose(100) is None
    states.unread = MOST_UNREAD - 1
    assert isinstance(made.propose(100), Draft)


def test_no_run_of_plain_steps_begins_with_tokens_to_read_again() -> None:
    states = SimpleNamespace(unread=1, recall=SimpleNamespace(reread=0))
    made = session(states, RowCosts({1: 1e-4, 32: 2e-4}))
    made._idle = 50
    assert made.plain_steps(100) == 0
    states.unread = 0
    assert made.plain_steps(100) > 1
