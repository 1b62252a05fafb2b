"""A cache layer that gives positions up: what is kept is chosen per row and kv head (`hf_accel.ops.eviction`).

Keys keep the rotary positions they were written with, so that what is left is attended to as in the full cache. Columns
are then no positions: the layer hands attention a mask of its own (`Held.visible`), in which padding does not exist.
Positions are given up after attention has read them, by every row when it has more than `capacity` and a slack of SLACK
tokens (of the prompt: at once), whatever rows are beside it. Cost: the choice, once per SLACK tokens; methods that look
at attention also its weights, O(B H T S) per step over what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.config import KVCacheConfig
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.core.calls.cache_layers import Reserved
from hf_accel.ops.eviction import (
    METHODS,
    accumulate,
    attention_weights,
    keep_positions,
    kept,
    key_norm_scores,
    snapkv_scores,
    tova_scores,
)

SLACK = 16
QUERIES = 256  # whose attention weights are made at a time


class EvictingLayer(GrowingLayer):
    """mask: bool [B, T] of the prompt's tokens that are not padding, None: all; noted: is told what evictions left."""

    is_croppable = False
    set_rows = None  # type: ignore[assignment]

    def __init__(
        self,
        config: KVCacheConfig,
        mask: torch.Tensor | None,
        expected_tokens: int = 0,
        codec: Codec = AS_IS,
        noted: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.mask, self.noted = config, mask, noted
        self.method = METHODS[config.method or "streaming"]
        self.seen = 0  # tokens that came, whatever became of them
        self._valid: torch.Tensor | None = None  # bool [B, G, S] of what is kept
        self._scores: torch.Tensor | None = None  # fp32 [B, G, S]: attention received so far
        self._counts: list[int] = []  # of each row: tokens that are kept
        super().__init__(min(expected_tokens, config.capacity + SLACK + 1), codec)

    def get_seq_length(self) -> int:
        return self.seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return handles of them and of what is kept, [B, G, S, D]."""
        super().update(key_states, value_states)
        batch, groups, tokens, _ = key_states.shape
        new = torch.ones(batch, tokens, dtype=torch.bool, device=key_states.device)
        counts = [tokens] * batch
        if self.mask is not None and self.seen < self.mask.shape[1]:
            self.mask = self.mask.repeat_interleave(batch // self.mask.shape[0], dim=0)
            some = self.mask[:, self.seen : self.seen + tokens].to(new)
            new[:, : some.shape[1]] = some
            counts = new.sum(1).tolist()
        self._counts = [a + b for a, b in zip(self._counts or [0] * batch, counts, strict=True)]
        new = new[:, None].expand(batch, groups, tokens)
        self._valid = new if self._valid is None else torch.cat([self._valid, new], dim=2)
        self.seen += tokens
        held = self._held(self._start, self._stop)
        # before anything is given up the model's masks would do, too, but ours costs the same
        held.visible, held.observe = self._valid, lambda query, scale: self._observe(query, scale, tokens)
        return held.states()

    def reserve(self, *args: Any, **kwargs: Any) -> Reserved | None:
        return None  # a kernel that writes and attends by position knows no holes

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RuntimeError: what was given up cannot come back."""
        if tokens_to_remove:
            raise RuntimeError("a cache that has given positions up cannot take steps back")

    def reset(self) -> None:
        super().reset()
        self.seen, self._valid, self._scores, self._counts = 0, None, None, []

    def _room(self, tokens: int) -> int:
        return max(min(self.config.capacity + SLACK + 1, 4 * tokens), tokens)

    def _select(self, choose: Any) -> None:
        super()._select(choose)
        if self._valid is None:
            return
        self._valid = choose(self._valid)
        self._counts = self._valid[:, 0].sum(1).tolist()
        self._scores = None if self._scores is None else choose(self._scores)
        self.mask = None if self.mask is None else choose(self.mask)

    def _observe(self, query: torch.Tensor, scale: float, tokens: int) -> None:
        """Take in the attention of the queries [B, H, T, D] and give up what is too much."""
        used, valid = self._stop - self._start, self._valid
        least = 1 if tokens > 1 else SLACK
        due = [count - self.config.capacity >= least for count in self._counts]
        if self.method.queries == "all":
            for start in range(0, tokens, QUERIES):
                some = query[:, :, start : start + QUERIES]
                weights = self._weights(some, scale, used - tokens + start)
                self._scores = self._added(weights, valid)
        if any(due):
            index, visible = self._choose(query, scale, tokens, due)
            self._counts = [self.config.capacity if is_due else n for n, is_due in zip(self._counts, due, strict=True)]
            keys: Any = self._used(self._keys)  # type: ignore[arg-type]
            values: Any = self._used(self._values)  # type: ignore[arg-type]
            keys, values = kept(keys, index), kept(values, index)
            if self._scores is not None:
                self._scores = self._scores.gather(2, index)
            self._valid = visible
            self._keys, self._values, self._start, self._stop = keys, values, 0, keys.shape[2]
            if self.noted:
                self.noted(used, self._stop)
            self._grow_buffers(SLACK)

    def _weights(self, query: torch.Tensor, scale: float, before: int) -> torch.Tensor:
        """Return attention weights [B, G, R, T, S] of queries of which the first has `before` columns before it."""
        keys = self._held(self._start, self._stop).dense()[0]
        tokens, positions = query.shape[2], keys.shape[2]
        columns = torch.arange(positions, device=query.device)
        causal = columns <= torch.arange(before, before + tokens, device=query.device)[:, None]  # [T, S]
        batch, groups = keys.shape[:2]
        valid: Any = self._valid
        # heads may keep different positions: each is a row of its own
        flat = attention_weights(
            query.unflatten(1, (groups, -1)).flatten(0, 1),
            keys.flatten(0, 1)[:, None],
            scale,
            causal & valid.flatten(0, 1)[:, None],
        )
        weights: torch.Tensor = flat.unflatten(0, (batch, groups))[:, :, 0]
        return weights

    def _added(self, weights: torch.Tensor, valid: Any) -> torch.Tensor:
        batch, groups = weights.shape[:2]
        scores = None if self._scores is None else self._scores.flatten(0, 1)[:, None]
        added = accumulate(scores, weights.flatten(0, 1)[:, None], valid.flatten(0, 1))
        return added.view(batch, groups, -1)

    def _choose(
        self, query: torch.Tensor, scale: float, tokens: int, due: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which columns to keep, int64 [B, G, K] ascending, and which of them are tokens, bool.

        Rows that are not due keep all they have.
        """
        used = self._stop - self._start
        valid: Any = self._valid
        rows: Any = valid.flatten(0, 1)  # [B G, S]
        scores: Any = None
        if self.method.queries == "all":
            scores = self._scores.flatten(0, 1)[:, None]  # type: ignore[union-attr]
        elif self.method.queries in ("window", "last"):
            some = min(tokens, self.config.recent if self.method.queries == "window" else 1)
            weights = self._weights(query[:, :, tokens - some :], scale, used - some)
            if self.method.queries == "window":
                scores = snapkv_scores(weights.flatten(0, 1)[:, None], rows)
            else:
                shared = weights.mean(dim=1, keepdim=True).expand_as(weights)
                scores = tova_scores(shared.flatten(0, 1)[:, None], rows)
        elif self.config.method == "key-norm":
            scores = key_norm_scores(self._held(self._start, self._stop).dense()[0]).flatten(0, 1)[:, None]
        index, visible = keep_positions(scores, rows, self.config.capacity, self.config.sinks, self.config.recent)
        chosen = torch.zeros_like(rows).scatter_(1, index[:, 0], visible[:, 0]).view_as(valid)
        if not all(due):
            chosen = torch.where(torch.tensor(due, device=rows.device)[:, None, None], chosen, valid)
        width = int(chosen.sum(2).max())
        index = chosen.long().argsort(dim=2, stable=True)[:, :, used - width :]  # of shorter rows padding comes first
        return index, chosen.gather(2, index)
