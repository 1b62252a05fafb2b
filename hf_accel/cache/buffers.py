"""Keys and values of a cache layer in preallocated buffers, which new ones are appended to in place.

Stock `DynamicLayer.update` is `torch.cat`: a step at S tokens reads and writes the whole cache, O(S) per token. Here
an append writes T positions and growth is geometric, O(1) amortised; dropping the last n tokens moves a counter.
Cost: up to 1.5 times the bytes in use, or what the call expects; the operating system backs untouched pages of them
with no memory, large pages of 2 MiB where it grants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_accel.cache.codec import Codec
from hf_accel.core.calls.held import Held, Part
from hf_accel.core.drift import VALUES_FOLLOW_KEYS
from hf_accel.kernels import pages

MINIMUM_TOKENS = 64


def growing_room(expected_tokens: int, tokens: int) -> int:
    """Return the capacity for `tokens` positions in use: what the call expects, else growth by a half."""
    return max(min(expected_tokens, 4 * tokens), tokens + tokens // 2, MINIMUM_TOKENS)


class Buffers:
    """Keys and values [B, G, C, D or bytes of a row], of which positions [start, stop) are in use.

    codec: how a position is kept; with bits, in rows of codes.
    room: returns the capacity to allocate for a number of positions in use.
    sizes, dtypes: head sizes and dtypes of keys and values as attention reads them.
    rows: int64 [B] on the CPU, where each row ends, if rows have different lengths; `stop` is then the longest row's.
    """

    __slots__ = ("bits", "codec", "dtypes", "keys", "room", "rows", "sizes", "start", "stop", "values")

    def __init__(self, codec: Codec, room: Callable[[int], int]) -> None:
        self.codec, self.bits, self.room = codec, codec.bits, room
        self.keys: Any = None  # a tensor once there is something to keep
        self.values: Any = None
        self.sizes = (0, 0)
        self.dtypes = (torch.float32, torch.float32)
        self.start = self.stop = 0
        self.rows: torch.Tensor | None = None

    # ---- what they hold

    def used(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the positions of a buffer that are in use."""
        return buffer.narrow(2, self.start, self.stop - self.start)

    def held(self, first: int, stop: int) -> Held:
        """Return a description of what lies at positions [first, stop), for attention to read as it is kept."""
        keys, values = self.keys[:, :, first:stop], self.values[:, :, first:stop]
        shape = keys.shape[0], keys.shape[1], stop - first
        return Held(shape, self.sizes, self.dtypes, keys.device, self.bits, lambda: iter([(keys, values)]))

    def states(self, first: int, stop: int) -> Part:
        """Return keys and values at positions [first, stop) for the model's attention: views, or handles of codes."""
        if self.bits is None:
            return self.keys[:, :, first:stop], self.values[:, :, first:stop]
        return self.held(first, stop).states()

    def dense(self, part: int) -> torch.Tensor | None:
        """Return all keys (part 0) or values (1) in use as a tensor, None before there are any."""
        buffer: torch.Tensor | None = (self.keys, self.values)[part]
        if buffer is None:
            return None
        return self.used(buffer) if self.bits is None else self.held(self.start, self.stop).dense()[part]

    # ---- what is put into them

    def clear(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Forget everything; what comes next is like these states."""
        self.keys = self.values = self.rows = None
        self.start = self.stop = 0
        self.sizes = key_states.shape[3], value_states.shape[3]
        self.dtypes = key_states.dtype, value_states.dtype

    def assign(self, part: int, tensor: torch.Tensor | None) -> None:
        """Make a tensor [B, G, S, D] the keys (part 0) or values (1); keys come first, and the length follows them."""
        if tensor is not None and self.bits is not None and tensor.dim() == 4:
            sizes, dtypes = list(self.sizes), list(self.dtypes)
            sizes[part], dtypes[part] = tensor.shape[3], tensor.dtype
            self.sizes, self.dtypes = (sizes[0], sizes[1]), (dtypes[0], dtypes[1])
            kept: torch.Tensor | None = self.codec.encode(tensor, is_key=part == 0)
        else:
            kept = tensor
        if part == 1:
            self.values = kept
            return
        self.keys, self.start, self.rows = kept, 0, None
        self.stop = tensor.shape[-2] if tensor is not None and tensor.dim() == 4 else 0

    def adopt(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        sizes: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        """Begin with keys and values [B, G, S, ...] as the codec keeps them, of head `sizes` and `dtypes`."""
        self.keys, self.values, self.sizes, self.dtypes, self.rows = keys, values, sizes, dtypes, None
        self.start, self.stop = 0, keys.shape[2]
        self.grow(1)

    def can_append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Return whether writing in place gives what concatenation would; what does not fit must fail as stock's."""
        if self.keys is None:
            return self.bits is not None or not key_states.requires_grad
        if (
            key_states.shape[:2] != self.keys.shape[:2]
            or value_states.shape[:2] != self.values.shape[:2]
            or (key_states.shape[3], value_states.shape[3]) != self.sizes
        ):
            return False
        return self.bits is not None or (
            _joins_as(self.keys, key_states)
            and _joins_as(self.values, value_states)
            and key_states.device == self.keys.device
            and not (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
        )

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write states [B, G, T, D], for which `can_append` holds, behind what is in use."""
        tokens = key_states.shape[2]
        if self.keys is None or self.stop + tokens > self.keys.shape[2] or self.is_frozen():
            self.make_room(key_states, value_states, tokens)
        keys, values = self.keys, self.values
        if self.rows is None:
            self.codec.write(key_states, keys.narrow(2, self.stop, tokens), is_key=True)
            self.codec.write(value_states, values.narrow(2, self.stop, tokens), is_key=False)
        else:
            columns = (self.rows[:, None] + torch.arange(tokens)).to(key_states.device)
            at = (torch.arange(len(columns), device=columns.device)[:, None], columns)
            keys.transpose(1, 2).index_put_(at, self.codec.encode(key_states, is_key=True).transpose(1, 2))
            values.transpose(1, 2).index_put_(at, self.codec.encode(value_states, is_key=False).transpose(1, 2))
        self.advance(tokens)

    def concatenate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do what stock does: where gradients flow, dtypes are promoted, or shapes do not fit and it raises."""
        keys, values = _joined(self.dense(0), key_states), _joined(self.dense(1), value_states)
        self.assign(0, keys)
        self.assign(1, values)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions of every row as in use; they have been written."""
        self.stop += tokens
        if self.rows is not None:
            self.rows = self.rows + tokens

    # ---- where rows end

    def end_rows_at(self, stops: list[int]) -> None:
        """Let row b end at position stops[b] of the buffers, from where its next tokens go on."""
        if self.rows is None:
            # what no row has written yet is read, if hidden: it must be numbers
            for buffer in (self.keys, self.values):
                buffer.narrow(2, self.stop, buffer.shape[2] - self.stop).zero_()
        self.rows, self.stop = torch.tensor(stops), max(stops)

    def end_at(self, stop: int) -> None:
        """Let all rows end at a position, or where the first in use begins if that is later."""
        self.rows, self.stop = None, max(self.start, stop)

    def earliest_stop(self) -> int:
        """Return where the shortest row ends."""
        return self.stop if self.rows is None else int(self.rows.min())

    def select(self, choose: Callable[[torch.Tensor], torch.Tensor], tokens: int = 1) -> None:
        """Replace what is in use by what `choose` makes of it, rows or positions, with room for `tokens` more."""
        self.keys, self.values = choose(self.used(self.keys)), choose(self.used(self.values))
        self.rows, self.start, self.stop = None, 0, self.keys.shape[2]
        self.grow(tokens)

    def keep_rows(self, slots: list[int], *, gives_back: bool) -> int:
        """Let row b be what row slots[b] >= b was and drop the others; return the bytes freed.

        gives_back: what remains is copied to buffers of its own; else single rows move, and the memory stays.
        """
        if self.keys is None:
            return 0
        # without room behind what is in use, tensors that were assigned may be somebody's
        copies = gives_back or self.is_frozen() or self.stop == self.keys.shape[2]
        before = self._storage_bytes()
        if self.rows is not None:
            self.rows = self.rows[slots]
        keep = self._copied_rows if copies else self._moved_rows
        self.keys = keep(self.keys, slots)  # one after the other, so that memory does not double
        self.values = keep(self.values, slots)
        return before - self._storage_bytes()

    def _moved_rows(self, buffer: torch.Tensor, slots: list[int]) -> torch.Tensor:
        used = self.used(buffer)
        for row, slot in enumerate(slots):
            if row != slot:
                used[row].copy_(used[slot])
        return buffer.narrow(0, 0, len(slots))

    def _copied_rows(self, before: torch.Tensor, slots: list[int]) -> torch.Tensor:
        buffer = pages.advise(before.new_empty((len(slots), *before.shape[1:])))
        old, new = self.used(before), self.used(buffer)
        for row, slot in enumerate(slots):
            new[row].copy_(old[slot])
        if self.rows is not None:
            buffer.narrow(2, self.stop, buffer.shape[2] - self.stop).zero_()
        return buffer

    def _storage_bytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for part in (self.keys, self.values))

    # ---- room

    def make_room(self, keys_like: torch.Tensor, values_like: torch.Tensor, tokens: int) -> None:
        """Make room for `tokens` more positions in buffers for states like these."""
        if self.keys is not None:
            self.grow(tokens)
            return
        values_dtype = values_like.dtype
        if VALUES_FOLLOW_KEYS:
            values_dtype = torch.promote_types(keys_like.dtype, values_dtype)
        room = self.room(tokens)
        self.keys = self._new(keys_like, keys_like.dtype, room)
        self.values = self._new(values_like, values_dtype, room)

    def _new(self, like: torch.Tensor, dtype: torch.dtype, room: int) -> torch.Tensor:
        batch, heads, _, size = like.shape
        shape = batch, heads, room, self.codec.row(size)
        return pages.advise(like.new_empty(shape, dtype=self.codec.kept_dtype(dtype)))

    def grow(self, tokens: int) -> None:
        """Move what is in use to the front of new buffers with room for `tokens` more."""
        used = self.stop - self.start
        room = self.room(used + tokens)
        self.keys, self.values = self._moved(self.keys, used, room), self._moved(self.values, used, room)
        if self.rows is not None:
            self.rows = self.rows - self.start
        self.start, self.stop = 0, used

    def _moved(self, before: torch.Tensor, used: int, room: int) -> torch.Tensor:
        buffer = pages.advise(before.new_empty((*before.shape[:2], room, before.shape[3])))
        if used:
            buffer.narrow(2, 0, used).copy_(before.narrow(2, self.start, used))
        if self.rows is not None:
            buffer.narrow(2, used, room - used).zero_()
        return buffer

    def make_room_for_kernel(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Make room that a kernel can write `tokens` positions of such states to; return whether that is possible."""
        keys = self.keys
        if keys is not None:
            shape = keys.shape
            if shape[0] != batch or shape[1] != kv_heads:
                return False
            if self.bits is not None:
                if self.sizes != (head_dim, head_dim) or self.dtypes != (dtype, dtype):
                    return False
            # a step under autocast may have left values in another dtype than keys
            elif shape[3] != head_dim or keys.dtype != dtype or self.values.dtype != dtype:
                return False
        if keys is None or self.stop + tokens > shape[2] or self.is_frozen():
            like = torch.empty((batch, kv_heads, 0, head_dim), dtype=dtype, device=device)
            self.make_room(like, like, tokens)
        return self.keys.stride(3) == 1 and self.values.stride(3) == 1  # type: ignore[no-any-return]

    def is_frozen(self) -> bool:
        """Return whether they cannot be written: inference tensors outside `torch.inference_mode`."""
        return self.keys.is_inference() and not torch.is_inference_mode_enabled()  # type: ignore[no-any-return]


def _joined(used: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if used is None else torch.cat([used, new], dim=-2)


def _joins_as(used: torch.Tensor, new: torch.Tensor) -> bool:
    """Return whether concatenation would keep the dtype of `used`."""
    return used.dtype == new.dtype or torch.promote_types(used.dtype, new.dtype) == used.dtype
