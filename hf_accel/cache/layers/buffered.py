"""A layer of transformers' whose keys and values lie in buffers: what every kind of cache layer here is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from hf_accel.cache.buffers import Buffers
from hf_accel.cache.codec import Codec
from hf_accel.core.calls.cache_layers import Reserved


class BufferedLayer(DynamicLayer):
    """Meets transformers' contract of a cache layer with `buffers`; kinds of it say what `update` keeps and returns.

    `keys` and `values` are views of the buffers, or decoded from them when they are asked for; assigning them, as
    inherited methods do, makes the assigned tensors the new buffers.
    """

    def __init__(self, buffers: Buffers, *args: Any) -> None:
        self.buffers = buffers
        super().__init__(*args)

    @property
    def codec(self) -> Codec:
        return self.buffers.codec

    @property
    def bits(self) -> int | None:
        return self.buffers.bits

    @property
    def keys(self) -> torch.Tensor | None:
        return self._dense(0)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._assign(0, tensor)

    @property
    def values(self) -> torch.Tensor | None:
        return self._dense(1)

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._assign(1, tensor)

    def _dense(self, part: int) -> torch.Tensor | None:
        return self.buffers.dense(part)

    def _assign(self, part: int, tensor: torch.Tensor | None) -> None:
        if tensor is not None and (reason := self.assignment_obstacle()):
            raise TypeError(reason)
        self.buffers.assign(part, tensor)

    def assignment_obstacle(self) -> str | None:
        """Return why `keys` and `values` cannot be assigned, None if they can."""
        return None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # as stock, but without its two empty tensors: they cost as much as an append
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.buffers.clear(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.buffers.stop - self.buffers.start

    def adopt(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        sizes: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        """Begin with keys and values [B, G, S, ...] as this layer keeps them, of head `sizes` and `dtypes`."""
        like = keys.new_empty((*keys.shape[:2], 0, 1), dtype=dtypes[0])
        self.lazy_initialization(like, like)
        self.buffers.adopt(keys, values, sizes, dtypes)

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Reserved | None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
        buffers = self.buffers
        if not self.is_initialized:
            like = torch.empty((batch, kv_heads, 0, head_dim), dtype=dtype, device=device)
            self.lazy_initialization(like, like)
        if not buffers.make_room_for_kernel(batch, tokens, kv_heads, head_dim, dtype, device):
            return None
        return Reserved(buffers.keys, buffers.values, buffers.stop, self._first_seen(), buffers.rows)

    def commit(self, tokens: int) -> None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
        self.buffers.advance(tokens)

    def _first_seen(self) -> int:
        """Return the first position of the buffers that the next token of any row can see."""
        return self.buffers.start

    def _add(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Append keys and values [B, G, T, D], in place if that gives what stock's concatenation would."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.buffers.can_append(key_states, value_states):
            self.buffers.append(key_states, value_states)
        else:
            self.buffers.concatenate(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens by moving a counter."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # raises, as stock does
        self.buffers.end_at(self.buffers.stop + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda used: used.index_select(0, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda used: used.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda used: used[indices, ...])

    def rows_stay(self, rows: int) -> str | None:
        """See `hf_accel.core.calls.cache_layers.LeavingLayer`."""
        return None

    def keep_rows(self, slots: list[int], *, gives_back: bool) -> int:
        """See `hf_accel.core.calls.cache_layers.LeavingLayer`."""
        return self.buffers.keep_rows(slots, gives_back=gives_back)

    def _select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the rows of the batch by those that `choose` makes of a tensor."""
        if self.get_seq_length():
            self.buffers.select(choose)
