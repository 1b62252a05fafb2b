"""How long a run is, and how its learning rate falls: a budget of minutes, tokens or steps.

With minutes the number of steps follows from measured ones, and is corrected on the way: where the machine turns out
slower or faster than it was measured, the rest of the decay is stretched over the steps that still fit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

WARMUP_SHARE = 0.03
_SPARE = 0.03  # of the minutes, for what nobody measured: saving, loading, other programs


@dataclass
class Schedule:
    """The factor of the learning rate at each step: linear warm-up, then down to zero at the last step.

    `knots`: (step, share of the run that is done by then), between which the share grows linearly; a run that is as
    long as it was planned has two. A scheduler of torch keeps them in its state, so a resumed run has the same.
    """

    knots: list[list[float]]
    decay: str = "cosine"
    warmup_share: float = WARMUP_SHARE

    @classmethod
    def of(cls, steps: int, decay: str) -> Schedule:
        return cls([[0, 0.0], [steps, 1.0]], decay)

    @property
    def steps(self) -> int:
        return int(self.knots[-1][0])

    def share(self, step: float) -> float:
        """Return the share of the run that is done after `step` steps, 0 to 1."""
        for (start, low), (stop, high) in zip(self.knots, self.knots[1:]):
            if step <= stop:
                return low + (high - low) * (step - start) / max(1, stop - start)
        return 1.0

    def end_at(self, steps: int, now: int) -> None:
        """Let the run end after `steps` steps from where it is now; what is behind stays as it was."""
        done = self.share(now)
        self.knots[:] = [knot for knot in self.knots[:-1] if knot[0] < now] + [[now, done], [max(steps, now + 1), 1.0]]

    def __call__(self, step: int) -> float:
        share = self.share(step + 0.5)
        if share < self.warmup_share:
            return share / self.warmup_share
        left = (1 - share) / (1 - self.warmup_share)
        return left if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


@dataclass
class Clock:
    """The wall time of a run, over all its sittings. `minutes` None: no bound."""

    minutes: float | None
    spent_s: float = 0.0  # by earlier sittings, up to their checkpoint
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.spent_s + time.monotonic() - self.began

    @property
    def left_s(self) -> float:
        """Seconds that are left, less what is kept in reserve; infinite without a bound."""
        return math.inf if self.minutes is None else 60 * self.minutes * (1 - _SPARE) - self.seconds

    def after(self, share: float) -> float:
        """Return the time (`time.monotonic`) when this share of the minutes is spent from now on."""
        return math.inf if self.minutes is None else time.monotonic() + share * 60 * self.minutes


@dataclass
class Pace:
    """How fast steps are, and whether the run ends in time. Seconds for evaluation are set aside."""

    clock: Clock
    step_s: float
    evaluation_s: float

    def affordable(self, evaluations: int) -> int:
        """Return how many steps still fit, beside `evaluations` of the held-out text."""
        return max(0, int((self.clock.left_s - evaluations * self.evaluation_s) / max(self.step_s, 1e-9)))

    def saw(self, seconds: float, weight: float) -> None:
        """Take in how long a step took."""
        self.step_s += weight * (seconds - self.step_s)

    def corrected(self, schedule: Schedule, now: int, evaluations: int) -> bool:
        """Move the end of the run to where the time is up, if it is not near it; return whether that was done."""
        if self.clock.minutes is None:
            return False
        end = now + max(1, self.affordable(evaluations))
        if 0 <= end - schedule.steps <= 0.1 * (schedule.steps - now) + 2:
            return False
        schedule.end_at(end, now)
        return True
