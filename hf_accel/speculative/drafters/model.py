"""Drafters that run a model: a cheaper form of the model over its own cache, or a smaller model over one of its own.

Cost: one forward pass of the drafting model per token. Over the model's own cache there is nothing else: the draft
reads the keys and values of the model, writes its own behind them, and is taken back before verification. A draft
model of its own has a cache of its own and must read the prompt first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.configuration_utils import GenerationMode

from hf_accel.core.calls.call import NewCache
from hf_accel.core.calls.doors import CacheMaker, Door
from hf_accel.core.calls.drafting import Draft, TokenChooser
from hf_accel.core.calls.following import following_positions, text_positions
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.calls.present import Present
from hf_accel.core.calls.rollback import record
from hf_accel.core.calls.rows import Rows
from hf_accel.core.drift import CACHE
from hf_accel.speculative.drafters.drafter import CONFIDENCE, Drafter, GoesOn, Guess


class ModelDrafter(Drafter):
    """Drafts token by token with a model."""

    def __init__(self, rows: Rows, chooser: TokenChooser) -> None:
        self.rows, self.chooser = rows, chooser

    def _draft(self, stepper: Stepper, tokens: torch.Tensor, most: int, goes_on: GoesOn) -> Guess:
        """Draft up to `most` tokens after feeding `tokens` [B, T], of which the last of each row is the row's last."""
        live = self.rows.live()
        drafts: torch.Tensor | None = None
        buckets: list[list[int]] = [[] for _ in range(len(self.rows))]
        drawn_from: list[torch.Tensor] = []
        for ahead in range(most):
            logits = stepper.forward(tokens)[:, -1:].to(self.rows.ids.device)
            scores = self.chooser.score(logits, drafts)
            tokens = self.chooser.choose(scores, ahead).clamp_(min=0)  # where there is nothing to choose, anything
            drafts = tokens if drafts is None else torch.cat([drafts, tokens], dim=1)
            probabilities = scores.softmax(dim=-1)
            if self.chooser.has_own_draws:
                drawn_from.append(probabilities)
            chances = probabilities.gather(2, tokens[:, :, None])[:, 0, 0].tolist()
            for row in live:
                buckets[row].append(sum(chances[row] >= bound for bound in CONFIDENCE))
            if ahead + 1 < most and not goes_on([buckets[row][-1] for row in live]):
                break
        counts = [len(found) for found in buckets]
        distributions = torch.cat(drawn_from, dim=1) if drawn_from else None
        return Guess(Draft(drafts, counts, distributions), buckets)  # type: ignore[arg-type]


class SharedCacheDrafter(ModelDrafter):
    """A cheaper form of the model, over the model's own cache. layers: those of the cache that it uses; None: all."""

    def __init__(
        self, model: Any, layers: list[int] | None, rows: Rows, chooser: TokenChooser, verifier: Stepper
    ) -> None:
        super().__init__(rows, chooser)
        self.model, self.layers, self.verifier = model, layers, verifier

    def propose(self, tokens: int, goes_on: GoesOn) -> Guess | None:
        stepper = self.verifier.beside(self.model, self.layers)
        before = list(stepper.lengths)
        try:
            return self._draft(stepper, self.rows.last(), tokens, goes_on)
        finally:
            stepper.keep(before)


class OwnCacheDrafter(ModelDrafter):
    """A smaller model with the same vocabulary, over a cache of its own. present: rows that are still verified."""

    def __init__(
        self,
        model: Any,
        prepare_cache: Any,
        rows: Rows,
        chooser: TokenChooser,
        kwargs: dict[str, Any],
        present: Present,
    ) -> None:
        super().__init__(rows, chooser)
        self.model, self.prepare_cache, self.kwargs, self.present = model, prepare_cache, kwargs, present
        config = model.config.get_text_config(decoder=True)
        self.context = int(getattr(config, "max_position_embeddings", None) or 2**62)
        self.stepper: Stepper | None = None

    @property
    def unread(self) -> int:
        return self.rows.prompt_tokens if self.stepper is None else 0

    def propose(self, tokens: int, goes_on: GoesOn) -> Guess | None:
        rows = self.rows
        tokens = min(tokens, self.context - max(rows.lengths))
        if tokens < 1:
            return None
        stepper = self.stepper or self._read_prompt()
        self._let_leave(stepper)
        # what it has read stays, but for drafts that were not accepted
        kept = [min(have, length - 1) for have, length in zip(stepper.lengths, rows.lengths, strict=True)]
        missing = [length - 1 - have for length, have in zip(rows.lengths, kept, strict=True)]
        live = rows.live()
        most = max(missing[row] for row in live)
        if any(missing[row] < most for row in live):
            if max(kept[row] for row in live) + most > self.context:
                return None
            # rows that have read more read filler behind their ends, which is taken back
            stepper.keep(rows.align_ended(kept))
            stepper.forward(self._tokens(stepper.lengths, most))
            kept, most = [length - 1 for length in rows.lengths], 0
        stepper.keep(rows.align_ended(kept))
        return self._draft(stepper, self._tokens(stepper.lengths, most + 1), tokens, goes_on)

    def _let_leave(self, stepper: Stepper) -> None:
        """Let rows leave that are not verified any more."""
        live = self.present.order
        gone = set(stepper.present.order) - set(live)
        if gone and stepper.rows_stay(len(live)) is None:
            stepper.leave(stepper.present.slots_without(gone), gives_back=2 * len(live) <= stepper.present.batch)

    def _tokens(self, starts: list[int], count: int) -> torch.Tensor:
        """Return `count` tokens [B, count] of each row from its start on, filler behind its end."""
        ids = self.rows.ids
        columns = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(count, device=ids.device)
        return ids.gather(1, columns.clamp(max=ids.shape[1] - 1))

    def _read_prompt(self) -> Stepper:
        """Run the prompt and return the stepper that holds it."""
        rows, mask, positions = self.rows, self.kwargs.get("attention_mask"), text_positions(self.kwargs)
        cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        host, expected = host_of(self.model), rows.ids.shape[1]
        maker: CacheMaker | None = None if host is None else host.doors.get(Door.NEW_CACHE)
        if maker is not None:
            mode = GenerationMode.SAMPLE if self.chooser.samples else GenerationMode.GREEDY_SEARCH
            maker.fill(NewCache(cache, self.model, mode, len(rows), expected, mask))
        elif self.prepare_cache is not None:
            self.prepare_cache(cache, expected)
        record(cache)
        prompt = rows.prompt_tokens
        inputs = {"input_ids": rows.ids[:, :prompt], "attention_mask": mask, "position_ids": positions, CACHE: cache}
        given = {name: value for name, value in inputs.items() if value is not None}
        self.model.get_decoder()(use_cache=True, return_dict=True, **given)
        following = following_positions({"position_ids": positions}, len(rows))
        self.stepper = Stepper(self.model, cache, [prompt] * len(rows), mask, following, prompt)
        if self.stepper.recall is not None:
            self.stepper.recall.is_tentative = True
        self.stepper.keep(self.stepper.lengths)
        return self.stepper
