"""Drafters that run a model: a cheaper form of the model over its own cache, or a smaller model over one of its own.

Cost: one forward pass of the drafting model per token. Over the model's own cache there is nothing else: the draft
reads the keys and values of the model, writes its own behind them, and is taken back before verification. A draft
model of its own has a cache of its own and must read the prompt first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hf_accel.core.calls.drafting import Draft

# drafts are alike when the drafter gave them a similar probability
CONFIDENCE = (0.4, 0.7, 0.9, 0.98)


@dataclass
class Proposal:
    """A draft and, per row, the bucket of each of its tokens."""

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
    def propose(self, tokens: int, goes_on: GoesOn) -> Proposal | None:
        """Return drafts of up to `tokens` tokens for the live rows, None where there is nothing to propose."""
