"""Cache layers that append into preallocated buffers instead of copying all keys and values at every token.

Stock `DynamicLayer.update` is `torch.cat`: a step at S tokens reads and writes the whole cache, O(S) per token. Here
an append writes T positions and growth is geometric, O(1) amortised; dropping the last n tokens moves a counter.
Cost: up to `growth` times the bytes in use, untouched pages of which the operating system never backs with memory.

Both layers are their stock classes with other storage: `keys` and `values` are views of the buffers, and assigning
them (as inherited methods do) adopts the assigned tensors as new buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.core.contracts import Reserved
from hf_accel.core.drift import VALUES_FOLLOW_KEYS

MINIMUM_TOKENS = 64


class Buffers:
    """Keys and values [B, G, C, D] of which positions [start, stop) are in use. Mixed over a stock layer class."""

    expected_tokens: int
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None
    _start = 0
    _stop = 0  # with rows of different length: of the longest
    _rows: torch.Tensor | None = None  # int64 [B] on the CPU: where each row ends; None: all end at `_stop`

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._keys is None else self._keys.narrow(2, self._start, self._stop - self._start)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        # inherited code assigns keys, then values; the length follows the keys
        self._keys, self._start, self._rows = tensor, 0, None
        self._stop = tensor.shape[-2] if tensor is not None and tensor.dim() == 4 else 0

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values.narrow(2, self._start, self._stop - self._start)

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._values = tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # as stock, but without its two empty tensors: they cost as much as an append
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._keys = self._values = self._rows = None
        self._start = self._stop = 0

    def get_seq_length(self) -> int:
        return self._stop - self._start

    def _room(self, tokens: int) -> int:
        """Return the capacity for `tokens` positions in use: what the call expects, else growth by a half."""
        return max(min(self.expected_tokens, 4 * tokens), tokens + tokens // 2, MINIMUM_TOKENS)

    def _move(self, keys_like: torch.Tensor, values_like: torch.Tensor, tokens: int) -> None:
        """Move what is in use to the front of buffers with room for `tokens` more, shaped like the new states."""
        used = self._stop - self._start
        room = self._room(used + tokens)
        values_dtype = values_like.dtype
        if VALUES_FOLLOW_KEYS:
            values_dtype = torch.promote_types(keys_like.dtype, values_dtype)
        for name, like, dtype in (("_keys", keys_like, keys_like.dtype), ("_values", values_like, values_dtype)):
            before = getattr(self, name)
            batch, heads, _, size = like.shape
            buffer = like.new_empty((batch, heads, room, size), dtype=dtype if before is None else before.dtype)
            if used:
                buffer.narrow(2, 0, used).copy_(before.narrow(2, self._start, used))
            if self._rows is not None:
                buffer.narrow(2, used, room - used).zero_()
            setattr(self, name, buffer)
        if self._rows is not None:
            self._rows = self._rows - self._start
        self._start, self._stop = 0, used

    def _has_room(self, tokens: int) -> bool:
        return self._keys is not None and self._stop + tokens <= self._keys.shape[2]

    def _can_append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Return whether writing in place gives what concatenation would; what does not fit must fail as stock's."""
        if self._keys is None:
            return not key_states.requires_grad
        return (
            key_states.shape[:2] == self._keys.shape[:2]
            and key_states.shape[3] == self._keys.shape[3]
            and value_states.shape[:2] == self._values.shape[:2]  # type: ignore[union-attr]
            and value_states.shape[3] == self._values.shape[3]  # type: ignore[union-attr]
            and _joins_as(self._keys, key_states)
            and _joins_as(self._values, value_states)  # type: ignore[arg-type]
            and key_states.device == self._keys.device
            and not (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
        )

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        tokens = key_states.shape[2]
        if not self._has_room(tokens) or self._is_frozen():
            self._move(key_states, value_states, tokens)
        if self._rows is None:
            self._keys.narrow(2, self._stop, tokens).copy_(key_states)  # type: ignore[union-attr]
            self._values.narrow(2, self._stop, tokens).copy_(value_states)  # type: ignore[union-attr]
        else:
            columns = (self._rows[:, None] + torch.arange(tokens)).to(key_states.device)
            at = (torch.arange(len(columns), device=columns.device)[:, None], columns)
            self._keys.transpose(1, 2).index_put_(at, key_states.transpose(1, 2))  # type: ignore[union-attr]
            self._values.transpose(1, 2).index_put_(at, value_states.transpose(1, 2))  # type: ignore[union-attr]
        self._grow(tokens)

    def _grow(self, tokens: int) -> None:
        self._stop += tokens
        if self._rows is not None:
            self._rows = self._rows + tokens

    def _end_rows_at(self, stops: list[int]) -> None:
        """Let row b end at position stops[b] of the buffers, from where its next tokens go on."""
        if self._rows is None:
            # what no row has written yet is read, if hidden: it must be numbers
            for buffer in (self._keys, self._values):
                buffer.narrow(2, self._stop, buffer.shape[2] - self._stop).zero_()  # type: ignore[union-attr]
        self._rows, self._stop = torch.tensor(stops), max(stops)

    def _earliest(self) -> int:
        """Return where the shortest row ends."""
        return self._stop if self._rows is None else int(self._rows.min())

    def _is_frozen(self) -> bool:
        """Inference tensors cannot be written outside `torch.inference_mode`; `torch.cat` never minded."""
        return self._keys.is_inference() and not torch.is_inference_mode_enabled()  # type: ignore[union-attr]

    def _are_of(self, dtype: torch.dtype) -> bool:
        """Return whether both buffers have `dtype`; a step under autocast may leave values in another than keys."""
        return self._keys.dtype == dtype and self._values.dtype == dtype  # type: ignore[union-attr]

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Reserved | None:
        """See `hf_accel.core.contracts.AppendableLayer`."""
        keys, values = self._keys, self._values
        if keys is None or values is None or self._stop + tokens > keys.shape[2] or self._is_frozen():
            like = torch.empty((batch, kv_heads, 0, head_dim), dtype=dtype, device=device)
            if keys is not None and (
                keys.shape[:2] != like.shape[:2] or keys.shape[3] != head_dim or not self._are_of(dtype)
            ):
                return None
            if not self.is_initialized:  # type: ignore[attr-defined]
                self.lazy_initialization(like, like)
            self._move(like, like, tokens)
            keys, values = self._keys, self._values
        elif (
            keys.shape[0] != batch or keys.shape[1] != kv_heads or keys.shape[3] != head_dim or not self._are_of(dtype)
        ):
            return None
        if keys.stride(3) != 1 or values.stride(3) != 1:  # type: ignore[union-attr]
            return None
        return keys, values, self._stop, self._start, self._rows  # type: ignore[return-value]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda used: used.index_select(0, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda used: used.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda used: used[indices, ...])

    def _select(self, choose: Any) -> None:
        """Replace the rows of the batch, keeping room to grow."""
        if self._stop == self._start:
            return
        keys, values = choose(self.keys), choose(self.values)
        self._keys, self._values, self._rows, self._start, self._stop = keys, values, None, 0, keys.shape[2]
        self._move(keys, values, 1)


class GrowingLayer(Buffers, DynamicLayer):
    """A full-attention layer; equal to `DynamicLayer` in everything but storage."""

    def __init__(self, expected_tokens: int = 0) -> None:
        self.expected_tokens = expected_tokens
        super().__init__()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return all of them, views [B, G, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._can_append(key_states, value_states):
            self.keys, self.values = _joined(self.keys, key_states), _joined(self.values, value_states)
        else:
            self._append(key_states, value_states)
        return self.keys, self.values  # type: ignore[return-value]

    def commit(self, tokens: int) -> None:
        self._grow(tokens)

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.contracts.RaggedLayer`."""
        return 0, self._stop - self._start + tokens

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.contracts.RaggedLayer`."""
        self._end_rows_at([self._start + length for length in lengths])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens by moving a counter."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # raises, as stock does
        self._rows = None
        self._stop = max(self._start, self._stop + tokens_to_remove)


class GrowingSlidingLayer(Buffers, DynamicSlidingWindowLayer):
    """A sliding-window layer; equal to `DynamicSlidingWindowLayer` in everything but storage.

    The window slides over the buffers by moving `start`; what is in use moves to the front when the room is spent.
    """

    def __init__(self, sliding_window: int, expected_tokens: int = 0) -> None:
        self.expected_tokens = min(expected_tokens, 2 * sliding_window)
        super().__init__(sliding_window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return those the new tokens can see, [B, G, <= window-1+T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._can_append(key_states, value_states):
            self.keys, self.values = _joined(self.keys, key_states), _joined(self.values, value_states)
            seen = max(0, self._stop - self.sliding_window + 1 - key_states.shape[2])
        else:
            seen = self._first_seen()
            kept = self._stop - seen
            if not self.record_past:
                self._start = seen
            self._append(key_states, value_states)
            seen = self._stop - key_states.shape[2] - kept
        tokens = key_states.shape[2]
        keys, values = self._keys[:, :, seen : self._stop], self._values[:, :, seen : self._stop]  # type: ignore[index]
        self._slide(tokens)
        return keys, values

    def commit(self, tokens: int) -> None:
        self._grow(tokens)
        self._slide(tokens)

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.contracts.RaggedLayer`."""
        before = self.cumulative_length - self._stop  # tokens that have left the buffers
        return before + self._first_seen(), self.cumulative_length + tokens

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.contracts.RaggedLayer`."""
        before = self.cumulative_length - self._stop
        self._end_rows_at([length - before for length in lengths])
        self.cumulative_length, self._start = max(lengths), self._first_seen()

    def reserve(self, *args: Any, **kwargs: Any) -> Reserved | None:
        """See `hf_accel.core.contracts.AppendableLayer`."""
        if not self.record_past:
            self._start = self._first_seen()
        reserved = super().reserve(*args, **kwargs)
        return None if reserved is None else (*reserved[:3], self._first_seen(), reserved[4])

    def _first_seen(self) -> int:
        """Return the first position that the next token of any row can see."""
        return max(self._start, self._earliest() - self.sliding_window + 1)

    def _slide(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if not self.record_past:
            self._start = self._first_seen()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; beyond the window only while the past is recorded, as stock."""
        if tokens_to_remove > 0 or (self.cumulative_length >= self.sliding_window and not self.record_past):
            super().crop(tokens_to_remove)  # raises, as stock does
        was_beyond = self.cumulative_length >= self.sliding_window
        self._rows = None
        self._stop = max(self._start, self._stop + tokens_to_remove)
        if was_beyond:
            self.cumulative_length += tokens_to_remove
            self._start = self._first_seen()
        elif tokens_to_remove:
            self.cumulative_length = self._stop - self._start


def _joined(used: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if used is None else torch.cat([used, new], dim=-2)


def _joins_as(used: torch.Tensor, new: torch.Tensor) -> bool:
    """Return whether concatenation would keep the dtype of `used`."""
    return used.dtype == new.dtype or torch.promote_types(used.dtype, new.dtype) == used.dtype
