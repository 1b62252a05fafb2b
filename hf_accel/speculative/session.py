"""Speculation in one `generate` call: asks the drafters, decides by the governor, and learns from what is accepted."""

from __future__ import annotations

import time
from collections.abc import Callable

from hf_accel.core.calls.drafting import Draft
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative.costs import StepCosts
from hf_accel.speculative.drafters.drafter import Proposal
from hf_accel.speculative.governor import Account, Choice, choose
from hf_accel.speculative.sources import Arm
from hf_accel.speculative.statistics import Statistics

# drafting nothing takes this long, and may take this share of the time
ASKING_S = 150e-6
ASKING_SHARE = 0.01
IDLE_STEPS = 4


class SpeculativeSession:
    """See `hf_accel.core.calls.drafting.Session`. arms: in the order in which they are asked."""

    def __init__(
        self,
        arms: list[Arm],
        rows: Rows,
        costs: StepCosts,
        most: int,
        adaptive: bool,
        totals: Statistics,
        close: Callable[[], None],
    ) -> None:
        self.arms, self.rows, self.costs, self.totals, self.close = arms, rows, costs, totals, close
        self.most, self.adaptive = most, adaptive
        self.account = Account()
        self._idle = 0  # tokens since the last draft
        self._just_napped = False
        self._current: tuple[Arm, Proposal, float] | None = None

    def propose(self, limit: int) -> Draft | None:
        most = min(limit, self.most)
        self._current = None
        found = self._fixed(most) if not self.adaptive else self._best(most, limit)
        if found is None:
            return None
        arm, proposal, seconds = found
        self._current = found
        if not arm.drafter.is_free:
            arm.observe(seconds, max(1, proposal.draft.tokens.shape[1]))
        return proposal.draft

    def nap(self, limit: int) -> int:
        """Asking costs time; where steps are short, more plain ones are made the longer no draft was worth it."""
        if not self.adaptive or self._idle < IDLE_STEPS:
            return 0
        longest = int(ASKING_S / (ASKING_SHARE * self.costs.step(1)))
        nap = min(limit - 1, longest, self._idle)
        return nap if nap > 1 and not self._just_napped else 0

    def observe(self, draft: Draft | None, accepted: list[int], seconds: float, steps: int = 1) -> None:
        tokens = 1 if draft is None else 1 + draft.tokens.shape[1]
        self.costs.observe(tokens, seconds)
        self.totals.step(steps * sum(count >= 0 for count in accepted), steps)
        self._just_napped = steps > 1
        if draft is None or self._current is None:
            self._idle += steps
            self.account.settle(float(steps), float(steps))
            return
        self._idle = 0
        arm, proposal, _ = self._current
        live = [row for row, count in enumerate(accepted) if count >= 0]
        for row in live:
            held = accepted[row]
            if not arm.drafter.is_free:
                for t, bucket in enumerate(proposal.buckets[row][: held + 1]):
                    arm.by_confidence.observe(bucket, t < held)
                    arm.overall.observe(0, t < held)
            self.totals.drafted(arm.source.name, draft.counts[row], held)
        if live:
            plain_s = self.costs.step(1)
            cost = (arm.draft_s * draft.tokens.shape[1] + self.costs.step(tokens)) / plain_s
            self.account.settle(cost, 1 + min(accepted[row] for row in live))

    def _pays_reading(self, arm: Arm, choice: Choice, left: int) -> bool:
        """Return whether what the arm promises for the tokens left is more than reading the prompt for it takes."""
        unread = arm.drafter.unread
        if not unread:
            return True
        batch = self.costs.batch
        read_s = arm.draft_s * self.costs.rows.ratio(batch * unread, batch)
        return left * (self.costs.step(1) - 1 / choice.rate) > read_s

    def _fixed(self, most: int) -> tuple[Arm, Proposal, float] | None:
        for arm in self.arms:
            start = time.perf_counter()
            proposal = arm.drafter.propose(most, lambda _: True)
            if proposal is not None:
                return arm, proposal, time.perf_counter() - start
        return None

    def _best(self, most: int, left: int) -> tuple[Arm, Proposal, float] | None:
        """Let the arm draft that promises most tokens per second, if any promises more than plain decoding.

        left: how many tokens may still come.
        """
        live = self.rows.live()
        best: tuple[float, Arm, int, Proposal | None] | None = None
        for arm in self.arms:
            proposal = None
            if arm.drafter.is_free:
                proposal = arm.drafter.propose(most, lambda _: True)
                if proposal is None:
                    continue
                chances = [[arm.by_confidence.chance(b) for b in proposal.buckets[row]] for row in live]
            else:
                chances = [[arm.overall.chance(0)] * most] * len(live)
            choice = choose(chances, arm.draft_s, self.costs, self.account, most)
            if choice.tokens and (best is None or choice.rate > best[0]) and self._pays_reading(arm, choice, left):
                best = (choice.rate, arm, choice.tokens, proposal)
        if best is None:
            return None
        rate, arm, tokens, proposal = best
        if proposal is not None:
            counts = [min(count, tokens) for count in proposal.draft.counts]
            width = max(counts)
            return arm, Proposal(Draft(proposal.draft.tokens[:, :width], counts), proposal.buckets), 0.0
        reach = 1.0
        step = 1

        def goes_on(latest: list[int]) -> bool:
            """Draft on while the next token promises more than the time it takes would bring otherwise."""
            nonlocal reach, step
            step += 1
            reach *= max(arm.by_confidence.chance(bucket) for bucket in latest)
            more_s = arm.draft_s + self.costs.step(step + 1) - self.costs.step(step)
            return reach * arm.overall.chance(0) > rate * more_s

        start = time.perf_counter()
        if self.account.lost < 0:  # in credit: as long as the drafter is sure
            most = min(most, tokens + 2)
        else:
            most = tokens
        proposal = arm.drafter.propose(most, goes_on)
        return None if proposal is None else (arm, proposal, time.perf_counter() - start)
