"""A layer of a sliding window that appends in place: the window slides over the buffers by moving their start."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_accel.cache.buffers import Buffers, growing_room
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.layers.buffered import BufferedLayer
from hf_accel.core.calls.cache_layers import Reserved


class GrowingSlidingLayer(BufferedLayer, DynamicSlidingWindowLayer):
    """Equal to `DynamicSlidingWindowLayer` in everything but storage.

    What is in use moves to the front of the buffers when their room is spent.
    """

    def __init__(self, sliding_window: int, expected_tokens: int = 0, codec: Codec = AS_IS) -> None:
        expected_tokens = min(expected_tokens, 2 * sliding_window)
        super().__init__(Buffers(codec, partial(growing_room, expected_tokens)), sliding_window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def adopt(self, keys: torch.Tensor, *args: Any) -> None:
        """As `BufferedLayer.adopt`, of all positions so far; the window must be recording its past."""
        super().adopt(keys, *args)
        self.cumulative_length = keys.shape[2]

    def get_seq_length(self) -> int:
        return self.cumulative_length

    @property
    def takes_states(self) -> bool:
        """See `hf_accel.core.calls.cache_layers.takes_states`: of codes the pass itself has to read."""
        return self.bits is None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return those the new tokens can see, [B, G, <= window-1+T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        buffers, tokens = self.buffers, key_states.shape[2]
        if not buffers.can_append(key_states, value_states):
            buffers.concatenate(key_states, value_states)
            seen = max(0, buffers.stop - self.sliding_window + 1 - tokens)
        else:
            seen = self._first_seen()
            before = buffers.stop - seen
            if not self.record_past:
                buffers.start = seen
            buffers.append(key_states, value_states)
            seen = buffers.stop - tokens - before  # they may have moved to the front
        returned = buffers.states(seen, buffers.stop)
        self._slide(tokens)
        return returned

    def reserve(self, *args: Any, **kwargs: Any) -> Reserved | None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
        if not self.record_past:
            self.buffers.start = self._first_seen()
        return super().reserve(*args, **kwargs)

    def commit(self, tokens: int) -> None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
        self.buffers.advance(tokens)
        self._slide(tokens)

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        return self._gone() + self._first_seen(), self.cumulative_length + tokens

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        gone = self._gone()
        self.buffers.end_rows_at([length - gone for length in lengths])
        self.cumulative_length, self.buffers.start = max(lengths), self._first_seen()

    def _gone(self) -> int:
        """Return how many tokens have left the buffers."""
        return self.cumulative_length - self.buffers.stop

    def _first_seen(self) -> int:
        return max(self.buffers.start, self.buffers.earliest_stop() - self.sliding_window + 1)

    def _slide(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if not self.record_past:
            self.buffers.start = self._first_seen()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; beyond the window only while the past is recorded, as stock."""
        was_beyond = self.cumulative_length >= self.sliding_window
        if tokens_to_remove > 0 or (was_beyond and not self.record_past):
            DynamicSlidingWindowLayer.crop(self, tokens_to_remove)  # raises, as stock does
        self.buffers.end_at(self.buffers.stop + tokens_to_remove)
        if was_beyond:
            self.cumulative_length += tokens_to_remove
            self.buffers.start = self._first_seen()
        else:
            self.cumulative_length = self.buffers.stop - self.buffers.start
