"""How often drafts are accepted: decayed counts per kind of draft, so that changes of text are followed."""

from __future__ import annotations

from collections.abc import Sequence

DECAY = 0.9


class Acceptance:
    """The chance that a draft is accepted, given that those before it were; one number per bucket.

    A bucket groups drafts alike in confidence: the length of a match, the drafter's own probability.
    """

    def __init__(self, priors: Sequence[float], weight: float = 4.0) -> None:
        self._priors, self._weight = list(priors), weight
        self._tried = [0.0] * len(self._priors)
        self._held = [0.0] * len(self._priors)

    def chance(self, bucket: int) -> float:
        """Return the estimate for a bucket."""
        return (self._held[bucket] + self._priors[bucket] * self._weight) / (self._tried[bucket] + self._weight)

    def observe(self, bucket: int, held: bool) -> None:
        """Take in one draft whose predecessors were all accepted."""
        self._tried[bucket] = DECAY * self._tried[bucket] + 1
        self._held[bucket] = DECAY * self._held[bucket] + held

    def blend(self, other: Acceptance) -> None:
        """Move what is believed halfway to what another tracker, a copy of this one, has come to believe."""
        for bucket in range(len(self._tried)):
            self._tried[bucket] = 0.5 * (self._tried[bucket] + other._tried[bucket])
            self._held[bucket] = 0.5 * (self._held[bucket] + other._held[bucket])

    def copy(self) -> Acceptance:
        """Return a tracker that believes what this one does and forgets nothing of its own."""
        found = Acceptance(self._priors, self._weight)
        found._tried, found._held = list(self._tried), list(self._held)
        return found
