"""What a drafter is: it guesses the next tokens of the rows of one call, and says how sure it is of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hf_accel.core.calls.drafting import Draft

# bounds of the buckets that drafts of a model fall into, by the probability that the drafter gave them
CONFIDENCE = (0.4, 0.7, 0.9, 0.98)


@dataclass
class Guess:
    """A draft and, per row, the bucket of `Acceptance` that each of its tokens falls into."""

    draft: Draft
    buckets: list[list[int]]


# (bucket of the latest token in the row that is surest) -> whether another one pays
GoesOn = Callable[[list[int]], bool]


class Drafter(ABC):
    """Proposes tokens in one `generate` call."""

    is_free: ClassVar[bool] = False  # drafts take no time, and the text itself shows what they are worth

    @property
    def unread(self) -> int:
        """How many tokens of each row the drafter must read before its first draft."""
        return 0

    @abstractmethod
    def propose(self, tokens: int, goes_on: GoesOn) -> Guess | None:
        """Return drafts of up to `tokens` tokens for the live rows, None where there is nothing to propose."""
