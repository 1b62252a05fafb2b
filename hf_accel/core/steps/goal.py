"""What the user wants of a model, and what patchers offer for it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_accel.core.calls.report import Skip
from hf_accel.core.config import Config


@dataclass(frozen=True)
class Goal:
    """A goal by name, and the bound on what it may cost.

    max_kl: nats per token of the original's text that lossy steps may cost; None: no step may cost anything.
    saves_memory: bytes count more than time.
    is_only_told: what would be tried is told, and nothing is run or timed to find it out.
    reference: makes what the cost is measured against, a `hf_accel.measure.quality.QualityReference`, once; it raises
        what keeps the model from being measured.
    """

    name: str
    max_kl: float | None = None
    saves_memory: bool = False
    is_only_told: bool = False
    reference: Callable[[], Any] | None = field(default=None, compare=False)

    @property
    def is_lossy(self) -> bool:
        return self.max_kl is not None


class Gain(enum.Enum):
    """In what the gain of a step shows, and so how it is timed.

    TOKENS: in steps of one token. SEVERAL_TOKENS: in steps of several tokens only, as drafts and chunked prompts make
    them. OVERHEAD: it does the computations of what it replaces, so that only microseconds of Python can differ; timed
    where a token is short enough to show those. OWN_ACCOUNT: it watches over what it gains by itself, call by call.
    """

    TOKENS = "tokens"
    SEVERAL_TOKENS = "several tokens"
    OVERHEAD = "overhead"
    OWN_ACCOUNT = "own account"


@dataclass
class Offer:
    """The configs that a patcher offers for a goal, the preferred first, and what it does not offer and why.

    quality: what the configs were measured to cost, where they cost anything.
    """

    configs: list[Config] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    quality: Any = None
