"""A cache layer that gives positions up: what is kept is chosen per row and kv head (`hf_accel.cache.eviction`).

Keys keep the rotary positions they were written with, so that what is left is attended to as in the full cache. The
columns of the cache are then no longer positions: the layer hands attention a mask of its own (`Held.visible`), which
hides padding. A row gives positions up once it has SLACK more than `capacity` (of the prompt: at once), after attention
has read them; other rows of the batch do not change when. Cost: the choice, once per SLACK tokens; methods that look at
attention also its weights, O(B H T S) per step over what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hf_accel.cache.buffers import Buffers
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.config import KVCacheConfig
from hf_accel.cache.eviction import METHODS
from hf_accel.cache.eviction.method import Evidence, by_head
from hf_accel.cache.layers.buffered import BufferedLayer
from hf_accel.core.calls.cache_layers import Reserved
from hf_accel.ops.eviction import accumulate, attention_weights, keep_positions, kept

SLACK = 16
QUERIES = 256  # whose attention weights are made at a time


def evicting_room(capacity: int, tokens: int) -> int:
    """Return the room for `tokens` positions in use, of which evictions leave `capacity`."""
    return max(min(capacity + SLACK + 1, 4 * tokens), tokens)


class EvictingLayer(BufferedLayer):
    """Keeps `config.capacity` positions of every row and kv head. It cannot take steps back: what is gone is gone.

    mask: bool [B, T] of the prompt's tokens that are not padding, None: all; noted: is told what evictions left.
    """

    is_croppable = False

    def __init__(
        self,
        config: KVCacheConfig,
        mask: torch.Tensor | None,
        codec: Codec = AS_IS,
        noted: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.mask, self.noted = config, mask, noted
        self.method = METHODS[config.method or "streaming"]
        self.seen = 0  # tokens that came, whatever became of them
        self._valid: torch.Tensor | None = None  # bool [B, G, S] of what is kept
        self._received: torch.Tensor | None = None  # fp32 [B, G, S]: attention of all queries so far
        self._counts: list[int] = []  # of each row: tokens that are kept
        super().__init__(Buffers(codec, partial(evicting_room, config.capacity)))

    def get_seq_length(self) -> int:
        return self.seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return handles of them and of what is kept, [B, G, S, D]."""
        self._add(key_states, value_states)
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
        held = self.buffers.held(self.buffers.start, self.buffers.stop)
        # before anything is given up the model's masks would do, too, but ours costs the same
        held.visible, held.observe = self._valid, lambda query, scale: self._observe(query, scale, tokens)
        return held.states()

    def reserve(self, *args: Any, **kwargs: Any) -> Reserved | None:
        """Return None: a kernel writes and attends by position, but columns here are no positions."""
        return None

    def crop(self, tokens_to_remove: int) -> None:
        """Raise RuntimeError, as layers do that are not croppable: what was given up cannot come back."""
        if tokens_to_remove:
            raise RuntimeError("a cache that has given positions up cannot take steps back")

    def reset(self) -> None:
        super().reset()
        self.seen, self._valid, self._received, self._counts = 0, None, None, []

    def _select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._select(choose)
        if self._valid is None:
            return
        self._valid = choose(self._valid)
        self._counts = self._valid[:, 0].sum(1).tolist()
        self._received = None if self._received is None else choose(self._received)
        self.mask = None if self.mask is None else choose(self.mask)

    def keep_rows(self, slots: list[int], *, gives_back: bool) -> int:
        """See `hf_accel.core.calls.cache_layers.LeavingLayer`."""
        if self._valid is not None:
            self._valid, self._counts = self._valid[slots], [self._counts[slot] for slot in slots]
        self._received = None if self._received is None else self._received[slots]
        self.mask = None  # of the prompt, which has been read
        return super().keep_rows(slots, gives_back=gives_back)

    def _keys(self) -> torch.Tensor:
        """Return the keys that are kept, decoded."""
        return self.buffers.held(self.buffers.start, self.buffers.stop).dense()[0]

    def _observe(self, query: torch.Tensor, scale: float, tokens: int) -> None:
        """Take in the attention of the queries [B, H, T, D] and give up what is too much."""
        used = self.buffers.stop - self.buffers.start
        least = 1 if tokens > 1 else SLACK
        due = [count - self.config.capacity >= least for count in self._counts]
        if self.method.sums_attention:
            for start in range(0, tokens, QUERIES):
                some = query[:, :, start : start + QUERIES]
                self._receive(self._weights(some, scale, used - tokens + start))
        if any(due):
            index, visible = self._choose(query, scale, tokens, due)
            self._counts = [self.config.capacity if is_due else n for n, is_due in zip(self._counts, due, strict=True)]
            self._received = None if self._received is None else self._received.gather(2, index)
            self._valid = visible
            self.buffers.select(lambda states: kept(states, index), tokens=SLACK)
            if self.noted:
                self.noted(used, index.shape[2])

    def _weights(self, query: torch.Tensor, scale: float, before: int) -> torch.Tensor:
        """Return attention weights [B, G, R, T, S] of queries of which the first has `before` columns before it."""
        keys = self._keys()
        tokens, positions = query.shape[2], keys.shape[2]
        columns = torch.arange(positions, device=query.device)
        causal = columns <= torch.arange(before, before + tokens, device=query.device)[:, None]  # [T, S]
        batch, groups = keys.shape[:2]
        valid: Any = self._valid
        # heads may keep different positions: each is a row of its own
        rows = query.unflatten(1, (groups, -1)).flatten(0, 1)
        flat = attention_weights(rows, by_head(keys), scale, causal & by_head(valid))
        weights: torch.Tensor = flat.unflatten(0, (batch, groups))[:, :, 0]
        return weights

    def _receive(self, weights: torch.Tensor) -> None:
        """Add attention weights [B, G, R, T, S] to what positions have received."""
        valid: Any = self._valid
        before = None if self._received is None else by_head(self._received)
        added = accumulate(before, by_head(weights), valid.flatten(0, 1))
        self._received = added.view(*weights.shape[:2], -1)

    def _choose(
        self, query: torch.Tensor, scale: float, tokens: int, due: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which columns to keep, int64 [B, G, K] ascending, and which of them are tokens, bool.

        Rows that are not due keep all they have.
        """
        config, used = self.config, self.buffers.stop - self.buffers.start

        def weights(queries: int) -> torch.Tensor:
            some = min(tokens, queries)
            return self._weights(query[:, :, tokens - some :], scale, used - some)

        valid: Any = self._valid
        rows: torch.Tensor = valid.flatten(0, 1)  # [B G, S]
        scores = self.method.scores(Evidence(rows, config.recent, self._keys, weights, self._received))
        index, visible = keep_positions(scores, rows, config.capacity, config.sinks, config.recent)
        chosen = torch.zeros_like(rows).scatter_(1, index[:, 0], visible[:, 0]).view_as(valid)
        if not all(due):
            chosen = torch.where(torch.tensor(due, device=rows.device)[:, None, None], chosen, valid)
        width = int(chosen.sum(2).max())
        index = chosen.long().argsort(dim=2, stable=True)[:, :, used - width :]  # of shorter rows padding comes first
        return index, chosen.gather(2, index)
