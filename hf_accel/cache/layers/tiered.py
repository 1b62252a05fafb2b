"""A cache layer with a hot buffer of two blocks; older blocks lie in the tiers (`hf_accel.cache.tiers.tiers`).

New positions go to the hot buffer. When it is full its older block moves out and the newer one to the front, so that
at least a block can always be taken back without touching the tiers. Attention goes over the blocks one by one, then
over the hot part. Cost: every position moves once within the buffer and once out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from hf_accel.cache.buffers import Buffers
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.layers.buffered import BufferedLayer
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.core.calls.cache_layers import Reserved
from hf_accel.core.calls.held import Held, Part


def hot_room(block_tokens: int, tokens: int) -> int:
    """Return the capacity of the hot buffer, however much of it is in use."""
    return 2 * block_tokens


class TieredLayer(BufferedLayer):
    """Equal to `GrowingLayer` but for where positions lie; `block_tokens` of them move together.

    Rows move out together, so that they cannot have different lengths: this is no RaggedLayer.
    """

    def __init__(self, index: int, tiers: Tiers, block_tokens: int, codec: Codec = AS_IS) -> None:
        self.index, self.tiers, self.block_tokens = index, tiers, block_tokens
        super().__init__(Buffers(codec, partial(hot_room, block_tokens)))

    @property
    def _away(self) -> int:
        """Positions that have moved out."""
        return self.tiers.count(self.index) * self.block_tokens

    def get_seq_length(self) -> int:
        return self._away + self.buffers.stop

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return handles of all of them, [B, G, S, D]. Gradients end here.

        Raises:
            TypeError: the tensors could only be joined to what is here as another dtype.
        """
        key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        buffers = self.buffers
        if not buffers.can_append(key_states, value_states):
            # fails as concatenation does
            torch.cat([buffers.used(buffers.keys), key_states], dim=-2)
            torch.cat([buffers.used(buffers.values), value_states], dim=-2)
            raise TypeError(
                f"a tiered cache layer holds {buffers.dtypes[0]} and {buffers.dtypes[1]}; {key_states.dtype} and "
                f"{value_states.dtype} came, as under another autocast than before"
            )
        at, tokens = 0, key_states.shape[2]
        while at < tokens:
            some = min(tokens - at, 2 * self.block_tokens - buffers.stop)
            if not some:
                self._move_out()
                continue
            buffers.append(key_states.narrow(2, at, some), value_states.narrow(2, at, some))
            at += some
        return self._all().states()

    def _move_out(self) -> None:
        """Move the older block of the full hot buffer to the tiers."""
        self._thaw()
        buffers, block = self.buffers, self.block_tokens
        self.tiers.put(self.index, buffers.keys.narrow(2, 0, block), buffers.values.narrow(2, 0, block))
        for buffer in (buffers.keys, buffers.values):
            buffer.narrow(2, 0, block).copy_(buffer.narrow(2, block, block))
        buffers.stop -= block

    def _thaw(self) -> None:
        """Make sure that the hot buffer can be written."""
        if self.buffers.is_frozen():
            self.buffers.grow(0)

    def _all(self) -> Held:
        hot = self.buffers.held(0, self.buffers.stop)
        batch, heads, tokens = hot.shape

        def parts() -> Iterator[Part]:
            yield from self.tiers.read(self.index)
            yield from hot.parts()

        return Held((batch, heads, self._away + tokens), hot.sizes, hot.dtypes, hot.device, hot.bits, parts)

    def _dense(self, part: int) -> torch.Tensor | None:
        return None if self.buffers.keys is None else self._all().dense()[part]

    def assignment_obstacle(self) -> str | None:
        return "a tiered cache layer takes keys and values by `update`, not by assignment"

    def reserve(self, batch: int, tokens: int, *args: Any, **kwargs: Any) -> Reserved | None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`; only while everything lies in the hot buffer."""
        if self._away or self.buffers.stop + tokens > 2 * self.block_tokens:
            return None
        return super().reserve(batch, tokens, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, taking blocks back where the hot part does not have so many."""
        left = max(0, self.get_seq_length() + tokens_to_remove) if tokens_to_remove <= 0 else 0
        while tokens_to_remove < 0 and left < self._away:
            self._thaw()
            keys, values = self.tiers.pop(self.index)
            self.buffers.keys.narrow(2, 0, self.block_tokens).copy_(keys)
            self.buffers.values.narrow(2, 0, self.block_tokens).copy_(values)
            self.buffers.stop = self.block_tokens
            tokens_to_remove = left - self._away - self.block_tokens
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.tiers.drop(self.index)
        super().reset()

    def _choose_rows(self, rows: torch.Tensor) -> None:
        if self.get_seq_length():
            self.tiers.select(self.index, rows)
            # also where nothing is hot, after `crop`: what comes next is of as many rows
            buffers = self.buffers
            buffers.keys = buffers.keys.index_select(0, rows.to(buffers.keys.device))
            buffers.values = buffers.values.index_select(0, rows.to(buffers.values.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._choose_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffers.keys is not None:
            self._choose_rows(torch.arange(self.buffers.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.buffers.keys is not None:
            self._choose_rows(torch.arange(self.buffers.keys.shape[0])[indices.cpu()])

    def rows_stay(self, rows: int) -> str | None:
        """See `hf_accel.core.calls.cache_layers.LeavingLayer`: of blocks in memory rows are copied at every step."""
        if self.buffers.keys is None or 3 * rows <= self.buffers.keys.shape[0] or not self.tiers.lends(self.index):
            return None
        return "older blocks of the cache are read where they lie"

    def keep_rows(self, slots: list[int], *, gives_back: bool) -> int:
        """See `hf_accel.core.calls.cache_layers.LeavingLayer`; blocks stay whole, and these rows are read of them."""
        self.tiers.select(self.index, torch.tensor(slots))
        return super().keep_rows(slots, gives_back=gives_back)
