"""What a model carries to speculate: its drafters, what they cost and are believed to be worth, and the counts.

Built once per config; a session is opened for every `generate` call that can be speculated in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_accel.core.contracts import Chooser
from hf_accel.core.hosting import Call
from hf_accel.core.rows import Rows
from hf_accel.core.stepping import Stepper
from hf_accel.speculative.acceptance import Acceptance
from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.copies import Form
from hf_accel.speculative.costs import RowCosts, StepCosts
from hf_accel.speculative.drafting import Drafter, OwnCacheDrafter, SharedCacheDrafter
from hf_accel.speculative.lookup import TenantHistory
from hf_accel.speculative.matching import LookupDrafter
from hf_accel.speculative.session import Arm, SpeculativeSession
from hf_accel.speculative.statistics import Statistics

# before anything is known of a text: the longer a match, the likelier what follows
MATCH_PRIORS = (0.25, 0.4, 0.6, 0.75, 0.85)
# how much oftener than all drafts those of a confidence are wrong
CONFIDENCE_ERRORS = (3.0, 2.0, 1.2, 0.5, 0.2)
SMALL_ROWS = 16  # up to here products of few rows may have kernels of their own


@dataclass
class Source:
    """A drafter of the model: `form` is the model that drafts, None for lookup; trackers outlive calls."""

    name: str
    form: Form | None
    draft_s: float
    overall: Acceptance
    by_confidence: Acceptance

    @classmethod
    def lookup(cls) -> Source:
        return cls("lookup", None, 0.0, Acceptance([0.5]), Acceptance(MATCH_PRIORS))

    @classmethod
    def model(cls, form: Form, agreement: float, draft_s: float) -> Source:
        # a short text may agree wholly by chance
        prior = min(max(agreement, 0.05), 0.95)
        by_confidence = [max(0.1, 1 - (1 - prior) * errors) for errors in CONFIDENCE_ERRORS]
        return cls(form.name, form, draft_s, Acceptance([prior]), Acceptance(by_confidence))


class ModelSpeculation:
    """See `hf_accel.core.contracts.Speculation`."""

    def __init__(
        self,
        config: SpeculativeConfig,
        sources: list[Source],
        rows: RowCosts,
        rounding: tuple[float, float],
        can_be_apart: bool,
        prepare_cache: Callable[[Any, int], None] | None,
    ) -> None:
        self.config, self.sources, self.row_costs, self.rounding = config, sources, rows, rounding
        self.can_be_apart, self.prepare_cache = can_be_apart, prepare_cache
        self.is_strict = config.strict
        self.has_own_draws = config.sampling == "residual"
        self.statistics = Statistics()
        self.history = TenantHistory(config.history_tokens) if config.history_tokens else None
        self._lock = threading.Lock()

    def rounding_bound(self, rows: int) -> float:
        return self.rounding[rows > SMALL_ROWS]

    def objection(self, call: Call) -> str | None:
        batch = call.input_ids.shape[0]
        if batch > 1 and not self.can_be_apart:
            return "rows of this model cannot have different lengths"
        if self.is_strict and max(self.rounding) > 0 and (batch > 1 or call.generation_config.do_sample):
            # draws turn on rounding anywhere, and rows apart are not rounded as rows in step, even one token at a time
            return "strict sampling and strict batches would need steps of one token throughout"
        return None

    def open(self, call: Call, rows: Rows, stepper: Stepper, chooser: Chooser) -> SpeculativeSession:
        self.statistics.opened()
        history = None
        if self.history is not None:
            history = self.history.of(str(call.options.get("tenant", "")))
        arms = []
        for source in self.sources:
            drafter: Drafter
            # a copy: calls run at the same time, and what one text is like says little about the next
            overall, by_confidence = source.overall.copy(), source.by_confidence.copy()
            if source.form is None:
                drafter = LookupDrafter(rows, by_confidence, history)
            elif source.form.has_own_cache:
                drafter = OwnCacheDrafter(source.form.model, self.prepare_cache, rows, chooser, call.model_kwargs)
            else:
                drafter = SharedCacheDrafter(source.form.model, source.form.layers, rows, chooser, stepper)
            arms.append(Arm(source.name, drafter, source.draft_s, overall, by_confidence))
        costs = StepCosts(self.row_costs, len(rows))

        def close() -> None:
            with self._lock:
                for source, arm in zip(self.sources, arms, strict=True):
                    source.overall.blend(arm.overall)
                    source.by_confidence.blend(arm.by_confidence)
            if history is not None:
                for text in rows.texts:
                    history.add(text)  # in one piece: other calls of the tenant may end at the same time

        return SpeculativeSession(arms, rows, costs, self.config, self.statistics, close)

    def skip(self, reason: str) -> None:
        self.statistics.skipped(reason)

    def note(self, near_ties: int) -> None:
        self.statistics.ties(near_ties)
