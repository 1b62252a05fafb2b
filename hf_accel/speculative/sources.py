"""The drafters to choose from: of a model, over all its calls, and in one call."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from hf_accel.speculative.acceptance import Acceptance
from hf_accel.speculative.drafters.drafter import Drafter
from hf_accel.speculative.forms import DraftForm

# how likely a draft of lookup is accepted before its text has shown anything: one chance for each bucket of lengths of
# the match, from the shortest on (`LENGTHS` in drafters/lookup.py)
MATCH_PRIORS = (0.25, 0.4, 0.6, 0.75, 0.85)
# how many times as often as the average draft of a model one is rejected: one factor for each bucket of the
# probability that the drafter gave it, from the lowest on (`CONFIDENCE` in drafters/drafter.py)
CONFIDENCE_ERRORS = (3.0, 2.0, 1.2, 0.5, 0.2)


@dataclass
class Source:
    """A drafter of the model, over all calls: `form` is the model that drafts, None for lookup."""

    name: str
    form: DraftForm | None
    draft_s: float
    overall: Acceptance
    by_confidence: Acceptance
    can_be_apart: bool = True

    @classmethod
    def lookup(cls) -> Source:
        return cls("lookup", None, 0.0, Acceptance([0.5]), Acceptance(MATCH_PRIORS))

    @classmethod
    def model(cls, form: DraftForm, agreement: float, draft_s: float, can_be_apart: bool) -> Source:
        # a short text may agree wholly by chance
        prior = min(max(agreement, 0.05), 0.95)
        by_confidence = [max(0.1, 1 - (1 - prior) * errors) for errors in CONFIDENCE_ERRORS]
        return cls(form.name, form, draft_s, Acceptance([prior]), Acceptance(by_confidence), can_be_apart)


@dataclass
class Candidate:
    """One drafter in one call, with what its drafts take and how often they are accepted."""

    source: Source
    drafter: Drafter
    draft_s: float  # seconds per drafted token, followed
    overall: Acceptance  # of any draft: what is known before drafting
    by_confidence: Acceptance  # of drafts by bucket: what is known once they are there
    _seen: deque[float] = field(default_factory=lambda: deque(maxlen=7))

    def __post_init__(self) -> None:
        self._seen.extend([self.draft_s] * 2)  # a first call finds weights cold

    def observe(self, seconds: float, tokens: int) -> None:
        """Take in what drafting `tokens` tokens took."""
        self._seen.append(seconds / tokens)
        self.draft_s = statistics.median(self._seen)
