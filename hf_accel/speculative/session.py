"""Speculation in one `generate` call: asks the drafters, decides by the governor, and learns from what is accepted."""

from __future__ import annotations

import time
from collections.abc import Callable

from hf_accel.core.calls.drafting import Draft
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative.costs import StepCosts
from hf_accel.speculative.drafters.drafter import Guess
from hf_accel.speculative.governor import Account, DraftLength, Reading, choose
from hf_accel.speculative.sources import Candidate
from hf_accel.speculative.statistics import Statistics

# looking for drafts where there are none takes about so long, and may take this share of a call
ASKING_S = 150e-6
ASKING_SHARE = 0.01
MOST_UNREAD = 16  # tokens that recurrent states may have to read again, before a step without drafts does it
IDLE_STEPS = 4  # without a draft, before plain steps are made without looking for one


class SpeculativeSession:
    """See `hf_accel.core.calls.drafting.Session`. candidates: in the order in which they are asked."""

    def __init__(
        self,
        candidates: list[Candidate],
        rows: Rows,
        costs: StepCosts,
        most: int,
        adaptive: bool,
        totals: Statistics,
        close: Callable[[], None],
        stepper: Stepper | None = None,
    ) -> None:
        self.candidates, self.rows, self.costs, self.totals, self.close = candidates, rows, costs, totals, close
        self.most, self.adaptive = most, adaptive
        self._stepper, self._recall = stepper, None if stepper is None else stepper.recall
        self.account = Account()
        self._idle = 0  # tokens since the last draft
        self._just_ran_plainly = False
        self._current: tuple[Candidate, Guess, float] | None = None

    def propose(self, limit: int) -> Draft | None:
        most = min(limit, self.most)
        self._current = None
        if self._reading().unread >= MOST_UNREAD:
            return None
        found = self._fixed(most) if not self.adaptive else self._best(most, limit)
        if found is None:
            return None
        candidate, guess, seconds = found
        self._current = found
        if not candidate.drafter.is_free:
            candidate.observe(seconds, max(1, guess.draft.tokens.shape[1]))
        return guess.draft

    def plain_steps(self, limit: int) -> int:
        """Return more steps the longer no draft was worth it, where steps are so short that asking for one counts."""
        if not self.adaptive or self._idle < IDLE_STEPS or self._reading().unread:
            return 0
        longest = int(ASKING_S / (ASKING_SHARE * self.costs.step(1)))
        steps = min(limit - 1, longest, self._idle)
        return steps if steps > 1 and not self._just_ran_plainly else 0

    def observe(self, draft: Draft | None, accepted: list[int], seconds: float, steps: int = 1) -> None:
        reread = 0 if self._recall is None else self._recall.reread
        tokens = reread + (1 if draft is None else 1 + draft.tokens.shape[1])
        self.costs.observe(tokens, seconds)
        self.totals.step(steps * sum(count >= 0 for count in accepted), steps)
        self._just_ran_plainly = steps > 1
        if draft is None or self._current is None:
            self._idle += steps
            more = self.costs.step(tokens) / self.costs.step(1) - 1 if reread else 0.0
            self.account.settle(steps + more, float(steps))
            return
        self._idle = 0
        candidate, guess, _ = self._current
        live = [row for row, count in enumerate(accepted) if count >= 0]
        for row in live:
            count = accepted[row]
            if not candidate.drafter.is_free:
                for t, bucket in enumerate(guess.buckets[row][: count + 1]):
                    candidate.by_confidence.observe(bucket, t < count)
                    candidate.overall.observe(0, t < count)
            self.totals.drafted(candidate.source.name, draft.counts[row], count)
        if live:
            plain_s = self.costs.step(1)
            cost = (candidate.draft_s * draft.tokens.shape[1] + self.costs.step(tokens)) / plain_s
            self.account.settle(cost, 1 + min(accepted[row] for row in live))

    def _reading(self) -> Reading:
        return Reading() if self._stepper is None or self._recall is None else Reading(self._stepper.unread, True)

    def _pays_reading(self, candidate: Candidate, length: DraftLength, left: int) -> bool:
        """Return whether drafting the tokens left gains more time than reading the prompt for it takes."""
        unread = candidate.drafter.unread
        if not unread:
            return True
        batch = self.costs.batch
        read_s = candidate.draft_s * self.costs.rows.ratio(batch * unread, batch)
        return left * (self.costs.step(1) - 1 / length.rate) > read_s

    def _fixed(self, most: int) -> tuple[Candidate, Guess, float] | None:
        """Let the first candidate draft that has something to say, as many tokens as it can."""
        for candidate in self.candidates:
            start = time.perf_counter()
            guess = candidate.drafter.propose(most, lambda _: True)
            if guess is not None:
                return candidate, guess, time.perf_counter() - start
        return None

    def _best(self, most: int, left: int) -> tuple[Candidate, Guess, float] | None:
        """Let the candidate draft that promises most tokens per second, if any promises more than plain decoding.

        left: how many tokens may still come.
        """
        live = self.rows.live()
        best: tuple[float, Candidate, int, Guess | None] | None = None
        for candidate in self.candidates:
            guess = None
            if candidate.drafter.is_free:
                guess = candidate.drafter.propose(most, lambda _: True)
                if guess is None:
                    continue
                chances = [[candidate.by_confidence.chance(b) for b in guess.buckets[row]] for row in live]
            else:
                chances = [[candidate.overall.chance(0)] * most] * len(live)
            length = choose(chances, candidate.draft_s, self.costs, self.account, most, self._reading())
            is_best = length.tokens > 0 and (best is None or length.rate > best[0])
            if is_best and self._pays_reading(candidate, length, left):
                best = (length.rate, candidate, length.tokens, guess)
        if best is None:
            return None
        rate, candidate, tokens, guess = best
        if guess is not None:
            counts = [min(count, tokens) for count in guess.draft.counts]
            width = max(counts)
            return candidate, Guess(Draft(guess.draft.tokens[:, :width], counts), guess.buckets), 0.0
        reach = 1.0
        step = 1

        def goes_on(latest: list[int]) -> bool:
            """Draft on while the next token promises more than the time it takes would bring otherwise."""
            nonlocal reach, step
            step += 1
            reach *= max(candidate.by_confidence.chance(bucket) for bucket in latest)
            width = step + self._reading().unread
            more_s = candidate.draft_s + self.costs.step(width + 1) - self.costs.step(width)
            return reach * candidate.overall.chance(0) > rate * more_s

        start = time.perf_counter()
        if self.account.lost < 0:  # in credit: as long as the drafter is sure
            most = min(most, tokens + 2)
        else:
            most = tokens
        guess = candidate.drafter.propose(most, goes_on)
        return None if guess is None else (candidate, guess, time.perf_counter() - start)
