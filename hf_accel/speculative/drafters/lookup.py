"""The drafter that runs no model: what followed the last tokens of a row earlier in its text, or in earlier calls.

Whether its drafts are right shows in the tokens that come next, even without verifying them: so it is judged at every
step, and its drafts are verified only where that pays. Cost: microseconds per step.
"""

from __future__ import annotations

import torch

from hf_accel.core.calls.drafting import Draft
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative.acceptance import Acceptance
from hf_accel.speculative.drafters.drafter import Drafter, GoesOn, Guess
from hf_accel.speculative.drafters.suffixes import SuffixIndex

# bounds of the buckets that drafts fall into, by the length of the match
LENGTHS = (3, 5, 8, 16)


class LookupDrafter(Drafter):
    """Matches the end of each row against its own text and, if given, against the history of the tenant."""

    is_free = True

    def __init__(self, rows: Rows, acceptance: Acceptance, history: SuffixIndex | None = None) -> None:
        self.rows, self.acceptance, self.history = rows, acceptance, history
        self.indices = [SuffixIndex() for _ in range(len(rows))]
        self._read = [0] * len(rows)
        self._expected: list[tuple[int, list[int], int] | None] = [None] * len(rows)

    def propose(self, tokens: int, goes_on: GoesOn) -> Guess | None:
        count = len(self.rows)
        found: list[list[int]] = [[] for _ in range(count)]
        buckets: list[list[int]] = [[] for _ in range(count)]
        for row in self.rows.live():
            text, index = self.rows.texts[row], self.indices[row]
            self._judge(row, text)
            index.extend(text[self._read[row] :])
            self._read[row] = len(text)
            drafts, match = index.propose(None, tokens)
            if self.history is not None:
                others, longer = self.history.propose(text[-32:], tokens)
                drafts, match = (others, longer) if longer > match else (drafts, match)
            bucket = sum(match >= bound for bound in LENGTHS)
            self._expected[row] = (len(text), drafts, bucket) if drafts else None
            found[row], buckets[row] = drafts, [bucket] * len(drafts)
        width = max(map(len, found), default=0)
        if not width:
            return None
        filled = torch.tensor([drafts + [0] * (width - len(drafts)) for drafts in found])
        return Guess(Draft(filled.to(self.rows.ids), [len(drafts) for drafts in found]), buckets)

    def _judge(self, row: int, text: list[int]) -> None:
        """Compare what was expected at the previous step with what came."""
        if self._expected[row] is None:
            return
        start, drafts, bucket = self._expected[row]  # type: ignore[misc]
        for draft, token in zip(drafts, text[start:], strict=False):
            self.acceptance.observe(bucket, draft == token)
            if draft != token:
                return
