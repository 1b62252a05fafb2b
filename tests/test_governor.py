"""Who decides how much is drafted, by made-up numbers: beliefs, costs, the account, lengths, plain runs, the counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_accel.core.calls.drafting import Draft
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative import costs as costs_module
from hf_accel.speculative.acceptance import DECAY, Acceptance
from hf_accel.speculative.costs import RECENT, REFRESH, RowCosts, StepCosts
from hf_accel.speculative.drafters.drafter import Drafter, Guess
from hf_accel.speculative.governor import (
    ALLOWANCE_SHARE,
    ALLOWANCE_STEPS,
    CREDIT_STEPS,
    GAIN,
    Account,
    DraftLength,
    choose,
)
from hf_accel.speculative.session import IDLE_STEPS, SpeculativeSession
from hf_accel.speculative.sources import Candidate, Source
from hf_accel.speculative.statistics import Statistics

FLAT = RowCosts({1: 1.0, 32: 1.0})  # reading weights is all it takes
STEEP = RowCosts({1: 1.0, 32: 32.0})  # every row costs as much as the first


def test_a_belief_begins_at_its_prior_and_follows_what_is_seen() -> None:
    belief = Acceptance([0.3, 0.8])
    assert belief.chance(0) == pytest.approx(0.3)
    assert belief.chance(1) == pytest.approx(0.8)
    seen = []
    for _ in range(60):
        belief.observe(0, True)
        seen.append(belief.chance(0))
    assert seen == sorted(seen)
    assert 0.7 < seen[-1] < 1.0, "the prior is never wholly forgotten"
    assert belief.chance(1) == pytest.approx(0.8), "another bucket"
    for _ in range(60):
        belief.observe(0, False)
    assert belief.chance(0) < 0.15


def test_a_belief_weighs_what_was_seen_last_most() -> None:
    early, late = Acceptance([0.5]), Acceptance([0.5])
    for index in range(20):
        early.observe(0, index < 10)
        late.observe(0, index >= 10)
    assert late.chance(0) > early.chance(0) + 0.2
    expected = (sum(DECAY**i for i in range(10)) + 0.5 * 4) / (sum(DECAY**i for i in range(20)) + 4)
    assert late.chance(0) == pytest.approx(expected)


def test_copies_learn_for_themselves_and_are_blended_halfway() -> None:
    belief = Acceptance([0.5, 0.5])
    belief.observe(1, True)
    twin = belief.copy()
    before = [belief.chance(0), belief.chance(1)]
    assert [twin.chance(0), twin.chance(1)] == before
    for _ in range(30):
        twin.observe(0, True)
    assert [belief.chance(0), belief.chance(1)] == before
    belief.blend(twin)
    assert before[0] < belief.chance(0) < twin.chance(0)
    assert belief.chance(1) == pytest.approx(before[1])
    belief.blend(belief.copy())
    assert before[0] < belief.chance(0) < twin.chance(0)


def test_rows_between_and_beyond_what_was_measured() -> None:
    rows = RowCosts({1: 2.0, 2: 2.0, 4: 3.0, 8: 7.0})
    assert [rows.at(n) for n in (1, 2, 3, 4, 6, 8)] == [2.0, 2.0, 2.5, 3.0, 5.0, 7.0]
    assert rows.at(10) == pytest.approx(9.0)
    assert rows.ratio(8, 1) == pytest.approx(3.5)
    assert rows.ratio(4, 4) == 1.0
    assert RowCosts({1: 2.0}).at(1) == 2.0
    assert RowCosts({1: 2.0}).at(8) == pytest.approx(16.0), "nothing else is known: as if rows were computed one by one"
    assert RowCosts({1: 1.0, 2: 0.1}).at(9) > 0, "noise makes no time negative"


def measure(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float], highest: int) -> Any:
    """Measure by a clock that only `forward` moves; returns the costs and the rows that were tried."""
    now, tried = [0.0], []

    def forward(rows: int) -> None:
        tried.append(rows)
        now[0] += seconds(rows, tried.count(rows))

    monkeypatch.setattr(costs_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return RowCosts.measure(forward, highest), tried


def test_the_least_of_alternating_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tried = measure(monkeypatch, lambda rows, time: 1 + 0.1 * rows + (5 if time == 1 and rows < 3 else 0), 4)
    assert tried == [1, 2, 3, 4] * 2
    assert rows.seconds == {n: pytest.approx(1 + 0.1 * n) for n in (1, 2, 3, 4)}


def test_rows_that_never_pay_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tried = measure(monkeypatch, lambda rows, time: float(rows**2), 32)
    assert max(tried) == 3
    assert tried.count(3) == 1
    assert rows.at(8) > 30
    _, tried = measure(monkeypatch, lambda rows, time: 1.0, 1)
    assert tried == [1, 1]


def test_steps_before_anything_is_seen_cost_what_was_measured() -> None:
    costs = StepCosts(RowCosts({1: 1.0, 2: 1.0, 4: 2.0, 8: 6.0}), batch=2)
    assert costs.step(1) == 1.0
    assert costs.step(2) == 2.0
    assert costs.step(4) == 6.0


def test_a_longer_context_makes_all_steps_longer() -> None:
    costs = StepCosts(RowCosts({1: 1.0, 5: 2.0}), batch=1)
    for _ in range(2 * REFRESH + RECENT):
        costs.observe(1, 3.0)
    assert costs.step(1) == 3.0
    assert costs.step(5) == pytest.approx(6.0), "of steps not seen only the ratio is known"
    for _ in range(2 * REFRESH):
        costs.observe(5, 4.0)
    assert costs.step(5) == 4.0


def test_one_slow_step_changes_no_estimate() -> None:
    costs = StepCosts(FLAT, batch=1)
    for number in range(20):
        costs.observe(1, 100.0 if number == 10 else 1.0)
        assert costs.step(1) == 1.0
        assert costs.step(4) == 1.0


def test_an_account_allows_a_little_at_once_and_a_share_in_the_long_run() -> None:
    account = Account()
    assert account.allows(ALLOWANCE_STEPS)
    assert not account.allows(ALLOWANCE_STEPS + 0.01)
    account.settle(1.5, 1.0)
    assert account.allows(ALLOWANCE_STEPS - 0.5)
    for _ in range(100):
        account.settle(1.0, 1.0)
    assert account.allows(ALLOWANCE_STEPS - 0.5 + 100 * ALLOWANCE_SHARE)
    assert not account.allows(ALLOWANCE_STEPS + 100 * ALLOWANCE_SHARE)


def test_what_was_gained_pays_for_a_while() -> None:
    account = Account()
    for _ in range(50):
        account.settle(1.0, 3.0)
    assert account.lost == -CREDIT_STEPS
    assert account.allows(CREDIT_STEPS)
    assert not account.allows(CREDIT_STEPS + ALLOWANCE_STEPS + 50 * ALLOWANCE_SHARE + 0.01)


def by_definition(
    chances: list[list[float]], draft_s: float, costs: StepCosts, account: Account, most: int
) -> DraftLength:
    """The k with the most tokens per second among those that the account allows, by equation 1."""
    plain_s = costs.step(1)
    best = DraftLength(0, 1 / plain_s)
    for k in range(1, most + 1):
        seconds = k * draft_s + costs.step(k + 1)
        if not account.allows(seconds / plain_s - 1):
            return best
        tokens = []
        for chain in chances:
            reach = [torch.tensor(chain[:i]).double().prod().item() if i <= len(chain) else 0.0 for i in range(k + 1)]
            tokens.append(sum(reach))
        rate = (sum(tokens) / len(tokens) + min(tokens)) / 2 / seconds
        if rate > best.rate * (1.0 if best.tokens else GAIN):
            best = DraftLength(k, rate)
    return best


@given(
    chances=st.lists(st.lists(st.floats(0.0, 1.0, width=32), max_size=8), min_size=1, max_size=4),
    draft_s=st.floats(0.0, 0.7),
    high=st.floats(1.0, 20.0),
    lost=st.floats(-4.0, 1.0),
    most=st.integers(1, 8),
)
def test_the_choice_is_the_best_by_definition(
    chances: list[list[float]], draft_s: float, high: float, lost: float, most: int
) -> None:
    account = Account()
    account.lost = lost
    costs = StepCosts(RowCosts({1: 1.0, 32: high}), len(chances))
    found = choose(chances, draft_s, costs, account, most)
    expected = by_definition(chances, draft_s, costs, account, most)
    assert found.tokens == expected.tokens
    assert found.rate == pytest.approx(expected.rate, rel=1e-5)


def rich() -> Account:
    account = Account()
    account.settle(0.0, CREDIT_STEPS)
    return account


@pytest.mark.parametrize(
    "chance, draft_s, rows, expected",
    [
        (0.0, 0.0, FLAT, 0),
        (0.02, 0.0, FLAT, 0),  # two in a hundred are not worth it
        (0.04, 0.0, FLAT, 8),  # four are; where drafts are free, as many as may be
        (0.9, 0.0, FLAT, 8),
        (0.9, 0.0, STEEP, 0),  # verification costs what decoding costs
        (0.9, 0.1, FLAT, 8),
        (0.5, 0.1, FLAT, 2),  # 1.75 tokens for 1.2 steps
        (0.3, 0.5, FLAT, 0),
        (0.99, 0.7, FLAT, 6),  # the account pays for 6 drafts, 4.2 steps more; 7 would cost 4.9
    ],
)
def test_numbers_worked_out_by_hand(chance: float, draft_s: float, rows: RowCosts, expected: int) -> None:
    assert choose([[chance] * 8], draft_s, StepCosts(rows, 1), rich(), 8).tokens == expected


def test_a_poor_account_pays_for_nothing() -> None:
    account = Account()
    account.settle(1.0 + ALLOWANCE_STEPS, 1.0)
    assert choose([[0.99] * 8], 0.1, StepCosts(FLAT, 1), account, 8).tokens == 0
    assert choose([[0.99] * 8], 0.0, StepCosts(FLAT, 1), account, 8).tokens == 8, "what is free may be tried"


def test_the_slowest_row_counts_as_much_as_all() -> None:
    costs = StepCosts(RowCosts({1: 1.0, 64: 2.0}), 4)
    all_good = choose([[0.9] * 8] * 4, 0.05, costs, rich(), 8)
    one_bad = choose([[0.9] * 8] * 3 + [[]], 0.05, costs, rich(), 8)
    one_good = choose([[0.9] * 8] + [[]] * 3, 0.05, costs, rich(), 8)
    assert all_good.rate > one_bad.rate > one_good.rate
    assert all_good.tokens >= one_bad.tokens >= one_good.tokens


@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=200),
    claimed=st.floats(0.0, 1.0),
    draft_s=st.floats(0.0, 0.7),
    high=st.floats(1.0, 32.0),
)
def test_no_call_loses_more_than_is_allowed(counts: list[int], claimed: float, draft_s: float, high: float) -> None:
    """Whatever is believed, and whatever becomes of the drafts."""
    account, costs = Account(), StepCosts(RowCosts({1: 1.0, 32: high}), 1)
    spent = brought = 0.0
    for accepted in counts:
        tokens = choose([[claimed] * 8], draft_s, costs, account, 8).tokens
        cost = tokens * draft_s + costs.step(tokens + 1)
        account.settle(cost, 1.0 + min(accepted, tokens))
        spent, brought = spent + cost, brought + 1 + min(accepted, tokens)
        assert spent - brought <= ALLOWANCE_STEPS + ALLOWANCE_SHARE * spent + 1e-9


class Scripted(Drafter):
    """Proposes what it is told, and asks whether to go on after each token."""

    unread = 0

    def __init__(self, buckets: list[int] | None) -> None:
        self.buckets, self.asked = buckets, []  # type: ignore[var-annotated]

    def propose(self, tokens: int, goes_on: Any) -> Guess | None:
        self.asked.append(tokens)
        if self.buckets is None:
            return None
        made = 1
        while made < tokens and goes_on([self.buckets[made - 1]]):
            made += 1
        draft = Draft(torch.zeros(1, made, dtype=torch.long), [made])
        return Guess(draft, [self.buckets[:made]])


def candidate(name: str, drafter: Drafter, chance: float = 0.9, draft_s: float = 0.05) -> Candidate:
    beliefs = Acceptance([chance]), Acceptance([0.05, 0.3, 0.6, 0.9, 0.99])
    return Candidate(Source(name, None, draft_s, *beliefs), drafter, draft_s, *beliefs)


def session(
    candidates: list[Candidate], rows: RowCosts = FLAT, ids: torch.Tensor | None = None, adaptive: bool = True
) -> Any:
    text = Rows(torch.arange(6)[None] if ids is None else ids, None, 100)
    made = SpeculativeSession(candidates, text, StepCosts(rows, len(text)), 6, adaptive, Statistics(), lambda: None)
    made.account = rich()
    return made


def test_without_a_governor_the_first_with_something_to_say_drafts() -> None:
    silent, speaking, last = Scripted(None), Scripted([0] * 9), Scripted([0] * 9)
    made = session([candidate("a", silent), candidate("b", speaking), candidate("c", last)], adaptive=False)
    assert made.propose(100).tokens.shape == (1, 6)
    assert (silent.asked, speaking.asked, last.asked) == ([6], [6], [])
    made.observe(Draft(torch.zeros(1, 6, dtype=torch.long), [6]), [2], 1.0)
    assert made.totals.to_dict()["proposed"] == {"b": 6}
    assert made.totals.to_dict()["accepted"] == {"b": 2}
    assert made.propose(3).tokens.shape == (1, 3), "no more than there is room for"


def test_the_governor_takes_who_promises_most() -> None:
    good, bad, dear = Scripted([4] * 9), Scripted([4] * 9), Scripted([4] * 9)
    made = session([candidate("bad", bad, 0.2), candidate("good", good, 0.9), candidate("dear", dear, 0.95, 0.6)])
    made.propose(100)
    assert (bad.asked, dear.asked) == ([], [])
    assert good.asked == [6]
    assert session([candidate("good", Scripted([4] * 9))], STEEP).propose(100) is None


def test_a_prompt_is_read_only_for_as_many_tokens_as_make_up_for_it() -> None:
    for left, drafts in ((100, True), (20, False)):  # 20 plain steps, for about half a step per token
        drafter = Scripted([4] * 9)
        drafter.unread = 4096
        made = session([candidate("model", drafter)], RowCosts({1: 1.0, 32: 4.1}))
        assert (made.propose(left) is not None) == drafts
        drafter.unread = 0
        assert made.propose(left) is not None


def test_a_draft_ends_where_its_drafter_is_unsure() -> None:
    for buckets, expected in (([4] * 9, 6), ([4, 4, 0, 4, 4, 4], 3), ([0] * 9, 1)):
        made = session([candidate("model", Scripted(buckets), 0.9, 0.2)])
        assert made.propose(100).counts == [expected], buckets


def test_a_session_learns_from_what_is_accepted() -> None:
    """The draft after the first wrong one says nothing."""
    one = candidate("model", Scripted([4] * 9))
    made = session([one], adaptive=False)
    draft = made.propose(100)
    before = one.overall.chance(0)
    made.observe(draft, [6], 1.0)
    assert one.overall.chance(0) > before
    draft = made.propose(100)
    for _ in range(5):
        made.observe(draft, [0], 1.0)
    assert one.overall.chance(0) < before
    tried = one.overall._tried[0]
    made.observe(draft, [1], 1.0)
    assert one.overall._tried[0] == pytest.approx((DECAY * tried + 1) * DECAY + 1), "one right, one wrong"


def test_plain_runs_follow_idle_steps_where_steps_are_short() -> None:
    def idle(step_s: float, steps: int, **fields: Any) -> Any:
        made = session([candidate("model", Scripted(None))], RowCosts({1: step_s, 32: step_s}), **fields)
        for _ in range(steps):
            assert made.propose(50) is None
            made.observe(None, [0], step_s)
        return made

    assert idle(0.001, IDLE_STEPS - 1).plain_steps(50) == 0
    assert idle(0.001, 8).plain_steps(50) == 8
    assert idle(0.001, 8).plain_steps(5) == 4
    assert idle(0.00099, 40).plain_steps(50) == 15, "asking takes a hundredth of the time"
    assert idle(0.1, 40).plain_steps(50) == 0, "long steps are not slowed by asking"
    assert idle(0.001, 40, adaptive=False).plain_steps(50) == 0
    made = idle(0.001, 8)
    made.observe(None, [0], 0.001, 8)
    assert made.plain_steps(50) == 0, "asked at least once between two plain runs"
    assert made.totals.to_dict()["steps"] == made.totals.to_dict()["tokens"] == 16


def test_counts_of_all_threads_come_together() -> None:
    totals = Statistics()
    assert totals.to_dict()["tokens_per_step"] is None
    assert str(totals) == "0 calls, no steps yet"

    def work() -> None:
        for _ in range(500):
            totals.opened()
            totals.step(2)
            totals.drafted("lookup", 4, 3)
            totals.skipped("why")
            totals.ties(2)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals.to_dict() == {
        "calls": 3000,
        "steps": 3000,
        "tokens": 3000 * (2 + 3),
        "tokens_per_step": 5.0,
        "proposed": {"lookup": 12000},
        "accepted": {"lookup": 9000},
        "near_ties": 6000,
        "plain_calls": {"why": 3000},
    }
    for words in ("3000 calls", "5.00 tokens per step", "lookup 9000 of 12000", "6000 choices", "3000 x plainly: why"):
        assert words in str(totals)
