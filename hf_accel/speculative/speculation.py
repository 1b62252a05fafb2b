"""What a model carries to speculate: its drafters, what they cost and are believed to be worth, and the counts.

Built once per config; a session is opened for every `generate` call that can be speculated in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.drafting import DraftModel, TokenChooser
from hf_accel.core.calls.following import Following
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.costs import StepCosts
from hf_accel.speculative.drafters.drafter import Drafter
from hf_accel.speculative.drafters.lookup import LookupDrafter
from hf_accel.speculative.drafters.model import OwnCacheDrafter, SharedCacheDrafter
from hf_accel.speculative.drafters.suffixes import TenantHistory
from hf_accel.speculative.familiarity import Familiarity
from hf_accel.speculative.proof import SMALL_ROWS, Proof
from hf_accel.speculative.session import SpeculativeSession
from hf_accel.speculative.sources import Candidate, Source
from hf_accel.speculative.statistics import Statistics


class ModelSpeculation:
    """See `hf_accel.core.calls.drafting.Speculation`."""

    def __init__(
        self,
        config: SpeculativeConfig,
        sources: list[Source],
        proof: Proof,
        rounding: tuple[float, float],
        prepare_cache: Callable[[Any, int], None] | None,
    ) -> None:
        self.config, self.sources, self.proof, self.rounding = config, sources, proof, rounding
        self.row_costs, self.prepare_cache = proof.rows, prepare_cache
        self.has_own_draws = config.sampling == "residual"
        self.statistics, self.familiarity = Statistics(), Familiarity()
        self.history = TenantHistory(config.history_tokens) if config.history_tokens else None
        self._lock = threading.Lock()

    def models(self) -> list[DraftModel]:
        forms = [source.form for source in self.sources if source.form is not None]
        return [DraftModel(form.model, form.layers, form.has_own_cache) for form in forms]

    def rounding_bound(self, rows: int) -> float:
        return self.rounding[rows > SMALL_ROWS]

    def obstacle(self, call: Call) -> str | None:
        batch = call.input_ids.shape[0]
        if self.proof.obstacle is not None:
            return self.proof.obstacle
        if batch > 1 and self.proof.apart is not None:
            return "rows of this model cannot have different lengths"
        # A near-tie could be decided again by a step of one token only if such steps had written all keys and values,
        # too. That is plain decoding, so where steps round differently there is nothing faster.
        if self.config.strict and (self.rounding[0] > 0 or (batch > 1 and self.proof.apart_difference > 0)):
            return "strict, and steps of several tokens round differently here"
        if self.config.strict and 2 * batch > SMALL_ROWS:
            return f"strict, and only steps of up to {SMALL_ROWS} rows round alike"
        return None

    def obstacle_of(self, call: Call, inputs: Following, stepper: Stepper, logits: torch.Tensor) -> str | None:
        return self.familiarity.obstacle(call, inputs, stepper, logits)

    def open(self, call: Call, rows: Rows, stepper: Stepper, chooser: TokenChooser) -> SpeculativeSession:
        self.statistics.opened()
        history = None
        if self.history is not None:
            history = self.history.of(call.request.tenant)
        candidates = []
        costs = StepCosts(self.row_costs, len(rows))
        scale = self.row_costs.ratio(len(rows), 1)  # drafts were timed for one row
        for source in self.sources:
            if len(rows) > 1 and not source.can_be_apart:
                continue
            drafter: Drafter
            # a copy: calls run at the same time, and what one text is like says little about the next
            overall, by_confidence = source.overall.copy(), source.by_confidence.copy()
            if source.form is None:
                drafter = LookupDrafter(rows, by_confidence, history)
            elif source.form.has_own_cache:
                drafter = OwnCacheDrafter(
                    source.form.model, self.prepare_cache, rows, chooser, call.model_kwargs, stepper.present
                )
            else:
                drafter = SharedCacheDrafter(source.form.model, source.form.layers, rows, chooser, stepper)
            candidates.append(Candidate(source, drafter, source.draft_s * scale, overall, by_confidence))
        most = self.config.max_draft_tokens
        if self.config.strict:
            most = min(most, SMALL_ROWS // len(rows) - 1)

        def close() -> None:
            with self._lock:
                for candidate in candidates:
                    candidate.source.overall.blend(candidate.overall)
                    candidate.source.by_confidence.blend(candidate.by_confidence)
            if history is not None:
                for text in rows.texts:
                    history.add(text)  # in one piece: other calls of the tenant may end at the same time

        adaptive = self.config.adaptive
        return SpeculativeSession(candidates, rows, costs, most, adaptive, self.statistics, close, stepper)

    def skip(self, reason: str) -> None:
        self.statistics.skipped(reason)

    def note(self, near_ties: int) -> None:
        self.statistics.ties(near_ties)
