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
        self._accepted = [0.0] * len(self._priors)

    def chance(self, bucket: int) -> float:
        """Return the estimate for a bucket."""
        return (self._accepted[bucket] + self._priors[bucket] * self._weight) / (self._tried[bucket] + self._weight)

    def observe(self, bucket: int, accepted: bool) -> None:
        """Take in one draft whose predecessors were all accepted."""
        self._tried[bucket] = DECAY * self._tried[bucket] + 1
        self._accepted[bucket] = DECAY * self._accepted[bucket] + accepted

    def blend(self, other: Acceptance) -> None:
        """Move every count halfway to that of `other`, which began as a copy of this tracker."""
        for bucket in range(len(self._tried)):
            self._tried[bucket] = 0.5 * (self._tried[bucket] + other._tried[bucket])
            self._accepted[bucket] = 0.5 * (self._accepted[bucket] + other._accepted[bucket])

    def copy(self) -> Acceptance:
        """Return a tracker with the same counts; what it observes from then on leaves this one as it is."""
        found = Acceptance(self._priors, self._weight)
        found._tried, found._accepted = list(self._tried), list(self._accepted)
        return found
