"""The contract between what verifies drafts and what makes them, so that neither has to import the other.

`Speculation` belongs to a model and opens a `Session` per call, which gives drafts; `TokenChooser` chooses its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.following import Following
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rows import Rows


class TokenChooser(Protocol):
    """Chooses tokens as the call at hand chooses them, so that a drafter can guess them."""

    samples: bool
    has_own_draws: bool  # drafts are drawn for themselves, and verified by acceptance and residual

    def score(self, logits: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor:
        """Return the processed scores [B, T, V] of logits [B, T, V], where the rows go on with the tokens `ahead`."""

    def choose(self, scores: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        """Return the tokens [B, T] for scores [B, T, V] that begin `ahead` tokens beyond the ends of the rows."""


@dataclass
class Draft:
    """Tokens [B, k] proposed to follow the rows, counts[b] of them in row b (the rest is filler).

    probabilities: [B, k, V], which the tokens were drawn from; None: they were chosen deterministically, or by the
    draws that verification makes as well.
    """

    tokens: torch.Tensor
    counts: list[int]
    probabilities: torch.Tensor | None = None


@dataclass(frozen=True)
class DraftModel:
    """A model that drafts: over the layers `layers` (None: all) of the cache of the model it drafts for, or its own."""

    model: Any
    layers: list[int] | None
    has_own_cache: bool


class Session(Protocol):
    """Speculation in one `generate` call: proposes before each step and is told what became of it."""

    def propose(self, limit: int) -> Draft | None:
        """Return drafts of at most `limit` tokens, None to decode one token plainly."""

    def plain_steps(self, limit: int) -> int:
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

    def models(self) -> list[DraftModel]:
        """Return the models that draft; each has a host of its own."""

    def rounding_bound(self, rows: int) -> float:
        """Return by how much logits may differ between a step of `rows` rows and one of a single token; 0: not."""

    def obstacle(self, call: Call) -> str | None:
        """Return why a call is decoded plainly, None if a session can be opened."""

    def obstacle_of(self, call: Call, inputs: Following, stepper: Stepper, logits: torch.Tensor) -> str | None:
        """Return why steps with inputs of this kind cannot be verified, None if they can; the prompt has run.

        stepper: over the call's cache, which is left as it was. logits: [B, 1, V], which the prompt gave.
        """

    def open(self, call: Call, rows: Rows, stepper: Stepper, chooser: TokenChooser) -> Session:
        """Open the session of a call whose prompt has run; `stepper` and `chooser` are those of its verification."""

    def skip(self, reason: str) -> None:
        """Count a call that was decoded plainly."""

    def note(self, near_ties: int) -> None:
        """Count choices that rounding could have turned."""
