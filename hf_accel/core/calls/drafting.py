"""What families may expect of one another, beyond transformers' own contracts, without importing one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rows import Rows


class Chooser(Protocol):
    """Scores and tokens as the call at hand chooses them; see `hf_accel.decoding.choosing.Chooser`."""

    samples: bool
    has_own_draws: bool  # drafts are drawn from proposals, and verified by acceptance and residual

    def score(self, logits: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor: ...

    def choose(self, scores: torch.Tensor, ahead: int = 0) -> torch.Tensor: ...


@dataclass
class Draft:
    """Tokens [B, k] proposed to follow the rows, counts[b] of them in row b (the rest is filler).

    proposal: [B, k, V], the probabilities they were drawn from; None: they were chosen deterministically, or by the
    draws that verification makes as well.
    """

    tokens: torch.Tensor
    counts: list[int]
    proposal: torch.Tensor | None = None


class Session(Protocol):
    """Speculation in one `generate` call: proposes before each step and is told what became of it."""

    def propose(self, limit: int) -> Draft | None:
        """Return drafts of at most `limit` tokens, None to decode one token plainly."""

    def nap(self, limit: int) -> int:
        """Return how many tokens to decode plainly before asking for drafts, at most `limit`; 0 to ask now."""

    def observe(self, draft: Draft | None, accepted: list[int], seconds: float, steps: int = 1) -> None:
        """Take in how many drafts of each row were accepted (-1: the row had ended) and what a forward pass took.

        steps: how many there were, of one token each if more than one.
        """

    def close(self) -> None:
        """The call is over."""


class Speculation(Protocol):
    """What a model carries to speculate: opens a session per call."""

    has_own_draws: bool  # sampled drafts are verified by acceptance and residual, not by the draws of plain decoding

    def rounding_bound(self, rows: int) -> float:
        """Return by how much logits may differ between a step of `rows` rows and one of a single token; 0: not."""

    def objection(self, call: Call) -> str | None:
        """Return why a call is decoded plainly, None if a session can be opened."""

    def open(self, call: Call, rows: Rows, stepper: Stepper, chooser: Chooser) -> Session: ...

    def skip(self, reason: str) -> None:
        """Count a call that was decoded plainly."""

    def note(self, near_ties: int) -> None:
        """Count choices that rounding could have turned."""
