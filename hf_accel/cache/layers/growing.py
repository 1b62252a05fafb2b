"""Cache layers that append into preallocated buffers instead of copying all keys and values at every token.

Stock `DynamicLayer.update` is `torch.cat`: a step at S tokens reads and writes the whole cache, O(S) per token. Here
an append writes T positions and growth is geometric, O(1) amortised; dropping the last n tokens moves a counter.
Cost: up to `growth` times the bytes in use, untouched pages of which the operating system never backs with memory.

Both layers are their stock classes with other storage: `keys` and `values` are views of the buffers, and assigning
them (as inherited methods do) adopts the assigned tensors as new buffers. With a codec the buffers hold rows of codes;
`update` then returns handles (`hf_accel.core.calls.held`), and `keys` and `values` are decoded when they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.core.calls.cache_layers import Reserved
from hf_accel.core.calls.held import Held
from hf_accel.core.drift import VALUES_FOLLOW_KEYS

MINIMUM_TOKENS = 64


class Buffers:
    """Keys and values [B, G, C, D or bytes of a row] of which positions [start, stop) are in use.

    Mixed over a stock layer class.
    """

    expected_tokens: int
    codec: Codec = AS_IS
    _sizes: tuple[int, int] = (0, 0)  # head sizes of keys and values
    _dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)  # that rows of codes are decoded to
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None
    _start = 0
    _stop = 0  # with rows of different length: of the longest
    _rows: torch.Tensor | None = None  # int64 [B] on the CPU: where each row ends; None: all end at `_stop`

    @property
    def bits(self) -> int | None:
        return self.codec.bits

    def _used(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.narrow(2, self._start, self._stop - self._start)

    @property
    def keys(self) -> torch.Tensor | None:
        if self._keys is None:
            return None
        return self._used(self._keys) if self.bits is None else self._held(self._start, self._stop).dense()[0]

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        # inherited code assigns keys, then values; the length follows the keys
        self._keys, self._start, self._rows = self._adopt(tensor, 0), 0, None
        self._stop = tensor.shape[-2] if tensor is not None and tensor.dim() == 4 else 0

    @property
    def values(self) -> torch.Tensor | None:
        if self._values is None:
            return None
        return self._used(self._values) if self.bits is None else self._held(self._start, self._stop).dense()[1]

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._values = self._adopt(tensor, 1)

    def _adopt(self, tensor: torch.Tensor | None, part: int) -> torch.Tensor | None:
        if tensor is None or self.bits is None or tensor.dim() != 4:
            return tensor
        if part == 0:
            self._sizes, self._dtypes = (tensor.shape[3], self._sizes[1]), (tensor.dtype, self._dtypes[1])
        else:
            self._sizes, self._dtypes = (self._sizes[0], tensor.shape[3]), (self._dtypes[0], tensor.dtype)
        return self.codec.encode(tensor, is_key=part == 0)

    def _held(self, first: int, stop: int) -> Held:
        """Return what lies at positions [first, stop) of the buffers."""
        keys, values = self._keys[:, :, first:stop], self._values[:, :, first:stop]  # type: ignore[index]
        return Held(
            (keys.shape[0], keys.shape[1], stop - first),
            self._sizes,
            self._dtypes,
            keys.device,
            self.bits,
            lambda: iter([(keys, values)]),
        )

    def _returned(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions [first, stop) for the model's attention."""
        if self.bits is None:
            return self._keys[:, :, first:stop], self._values[:, :, first:stop]  # type: ignore[index]
        return self._held(first, stop).states()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # as stock, but without its two empty tensors: they cost as much as an append
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._keys = self._values = self._rows = None
        self._start = self._stop = 0
        self._sizes = key_states.shape[3], value_states.shape[3]
        self._dtypes = key_states.dtype, value_states.dtype

    def get_seq_length(self) -> int:
        return self._stop - self._start

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
        self._keys, self._values, self._stop = keys, values, keys.shape[2]
        self._sizes, self._dtypes = sizes, dtypes
        self._grow_buffers(1)

    def _room(self, tokens: int) -> int:
        """Return the capacity for `tokens` positions in use: what the call expects, else growth by a half."""
        return max(min(self.expected_tokens, 4 * tokens), tokens + tokens // 2, MINIMUM_TOKENS)

    def _move(self, keys_like: torch.Tensor, values_like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` more positions in buffers for states like these."""
        if self._keys is None:
            values_dtype = values_like.dtype
            if VALUES_FOLLOW_KEYS:
                values_dtype = torch.promote_types(keys_like.dtype, values_dtype)
            for name, like, dtype in (("_keys", keys_like, keys_like.dtype), ("_values", values_like, values_dtype)):
                batch, heads, _, size = like.shape
                shape = (batch, heads, 0, self.codec.row(size))
                setattr(self, name, like.new_empty(shape, dtype=self.codec.kept_dtype(dtype)))
        self._grow_buffers(tokens)

    def _grow_buffers(self, tokens: int) -> None:
        """Move what is in use to the front of buffers with room for `tokens` more."""
        used = self._stop - self._start
        room = self._room(used + tokens)
        for name in ("_keys", "_values"):
            before = getattr(self, name)
            batch, heads, _, row = before.shape
            buffer = before.new_empty((batch, heads, room, row))
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
            return self.bits is not None or not key_states.requires_grad
        if (
            key_states.shape[:2] != self._keys.shape[:2]
            or value_states.shape[:2] != self._values.shape[:2]  # type: ignore[union-attr]
            or (key_states.shape[3], value_states.shape[3]) != self._sizes
        ):
            return False
        return self.bits is not None or (
            _joins_as(self._keys, key_states)
            and _joins_as(self._values, value_states)  # type: ignore[arg-type]
            and key_states.device == self._keys.device
            and not (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
        )

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        tokens = key_states.shape[2]
        if not self._has_room(tokens) or self._is_frozen():
            self._move(key_states, value_states, tokens)
        keys: Any = self._keys
        values: Any = self._values
        if self._rows is None:
            self.codec.write(key_states, keys.narrow(2, self._stop, tokens), is_key=True)
            self.codec.write(value_states, values.narrow(2, self._stop, tokens), is_key=False)
        else:
            columns = (self._rows[:, None] + torch.arange(tokens)).to(key_states.device)
            at = (torch.arange(len(columns), device=columns.device)[:, None], columns)
            keys.transpose(1, 2).index_put_(at, self.codec.encode(key_states, is_key=True).transpose(1, 2))
            values.transpose(1, 2).index_put_(at, self.codec.encode(value_states, is_key=False).transpose(1, 2))
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
        if self.bits is not None:
            return self._dtypes == (dtype, dtype)
        return self._keys.dtype == dtype and self._values.dtype == dtype  # type: ignore[union-attr]

    def _are_like(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
        shape = self._keys.shape  # type: ignore[union-attr]
        fits = shape[3] == head_dim if self.bits is None else self._sizes == (head_dim, head_dim)
        return fits and shape[0] == batch and shape[1] == kv_heads and self._are_of(dtype)

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Reserved | None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
        keys, values = self._keys, self._values
        if keys is None or values is None or self._stop + tokens > keys.shape[2] or self._is_frozen():
            like = torch.empty((batch, kv_heads, 0, head_dim), dtype=dtype, device=device)
            if keys is not None and not self._are_like(batch, kv_heads, head_dim, dtype):
                return None
            if not self.is_initialized:  # type: ignore[attr-defined]
                self.lazy_initialization(like, like)
            self._move(like, like, tokens)
            keys, values = self._keys, self._values
        elif not self._are_like(batch, kv_heads, head_dim, dtype):
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
        keys, values = choose(self._used(self._keys)), choose(self._used(self._values))  # type: ignore[arg-type]
        self._keys, self._values, self._rows, self._start, self._stop = keys, values, None, 0, keys.shape[2]
        self._grow_buffers(1)


class GrowingLayer(Buffers, DynamicLayer):
    """A full-attention layer; equal to `DynamicLayer` in everything but storage."""

    def __init__(self, expected_tokens: int = 0, codec: Codec = AS_IS) -> None:
        self.expected_tokens, self.codec = expected_tokens, codec
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
        return self._returned(self._start, self._stop)

    def commit(self, tokens: int) -> None:
        self._grow(tokens)

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        return 0, self._stop - self._start + tokens

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
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

    def __init__(self, sliding_window: int, expected_tokens: int = 0, codec: Codec = AS_IS) -> None:
        self.expected_tokens, self.codec = min(expected_tokens, 2 * sliding_window), codec
        super().__init__(sliding_window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def adopt(self, keys: torch.Tensor, *args: Any) -> None:
        """As `Buffers.adopt`, of all positions so far; the window must be recording its past."""
        super().adopt(keys, *args)
        self.cumulative_length = keys.shape[2]

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
        returned = self._returned(seen, self._stop)
        self._slide(tokens)
        return returned

    def commit(self, tokens: int) -> None:
        self._grow(tokens)
        self._slide(tokens)

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        before = self.cumulative_length - self._stop  # tokens that have left the buffers
        return before + self._first_seen(), self.cumulative_length + tokens

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        before = self.cumulative_length - self._stop
        self._end_rows_at([length - before for length in lengths])
        self.cumulative_length, self._start = max(lengths), self._first_seen()

    def reserve(self, *args: Any, **kwargs: Any) -> Reserved | None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
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
