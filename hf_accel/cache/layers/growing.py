"""A layer of full attention that appends in place instead of copying all keys and values at every token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hf_accel.cache.buffers import Buffers, growing_room
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.layers.buffered import BufferedLayer


class GrowingLayer(BufferedLayer):
    """Equal to `DynamicLayer` in everything but storage. With a codec `update` returns handles of codes."""

    def __init__(self, expected_tokens: int = 0, codec: Codec = AS_IS) -> None:
        super().__init__(Buffers(codec, partial(growing_room, expected_tokens)))

    @property
    def takes_states(self) -> bool:
        """See `hf_accel.core.calls.cache_layers.takes_states`: of codes the pass itself has to read."""
        return self.bits is None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return all of them, views [B, G, S, D]."""
        self._add(key_states, value_states)
        return self.buffers.states(self.buffers.start, self.buffers.stop)

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        return 0, self.get_seq_length() + tokens

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        self.buffers.end_rows_at([self.buffers.start + length for length in lengths])
