"""Cache layers of one call over the fixed buffers of a slot: what prompts, and all that is not captured, see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.compilation.step_layers import StepLayer
from hf_accel.core.calls.held import Held
from hf_accel.ops import cached


class CallLayer(DynamicLayer):
    """Meets transformers' contract of a cache layer: lengths are the host's, and only what is filled is seen.

    Where the buffers do not fit (another shape, more tokens than columns, gradients, rows exchanged), the layer leaves
    its slot and goes on by concatenation, as stock's does.
    """

    is_sliding = False

    def __init__(self, slot: Any, index: int, window: int | None = None) -> None:
        """slot: a `Slot`, rows of a shared one, or a claim to either."""
        self.index, self.window = index, window
        self.bits, self.length = slot.fill.bits, 0
        self.rows: list[int] | None = None  # where rows have different lengths, the length of each
        self.sizes, self.dtypes = (0, 0), (torch.float32, torch.float32)
        self._kept: list[Any] = [None, None]  # keys and values as they are kept, once the slot is left
        self.step_layer: StepLayer | None = None
        CacheLayerMixin.__init__(self)  # which assigns keys and values
        self.slot: Any = slot

    # ---- what transformers' own methods read and assign

    @property
    def keys(self) -> Any:
        return self._dense(0)

    @keys.setter
    def keys(self, tensor: Any) -> None:
        self._assign(0, tensor)

    @property
    def values(self) -> Any:
        return self._dense(1)

    @values.setter
    def values(self, tensor: Any) -> None:
        self._assign(1, tensor)

    def _used(self, part: int) -> Any:
        """Return keys (part 0) or values (1) as they are kept, without what lies behind the longest row."""
        if self.step_layer is None:
            return self._kept[part]
        buffer = self.step_layer.values if part else self.step_layer.keys
        return buffer.narrow(2, 0, self.length)

    def _dense(self, part: int) -> Any:
        used = self._used(part)
        if used is None or self.bits is None:
            return used
        return cached.decode(used, self.bits, self.sizes[part], self.dtypes[part], is_key=part == 0)

    def _assign(self, part: int, tensor: Any) -> None:
        self.leave()
        if tensor is not None and self.bits is not None and tensor.dim() == 4:
            tensor = cached.encode(tensor, self.bits, is_key=part == 0)
        self._kept[part] = tensor
        if part == 0:
            self.rows, self.length = None, tensor.shape[2] if tensor is not None and tensor.dim() == 4 else 0

    # ---- growing

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.sizes = key_states.shape[3], value_states.shape[3]
        self.dtypes = key_states.dtype, value_states.dtype
        self.length, self.rows = 0, None
        if self.slot is not None:
            self.slot = self.slot.given()
        if self.slot is not None:
            self.step_layer = self.slot.layer(self.index, self.window, key_states, value_states)
        if self.step_layer is None:
            self.slot, self._kept = None, [self._empty(key_states, 0), self._empty(value_states, 1)]

    def _empty(self, states: torch.Tensor, part: int) -> torch.Tensor:
        return self._encoded(states[:, :, :0], part)

    def _encoded(self, states: torch.Tensor, part: int) -> torch.Tensor:
        return states if self.bits is None else cached.encode(states, self.bits, is_key=part == 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, G, T, D]; return all of them, [B, G, S, D], or handles of codes."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if self.step_layer is not None and not self._fits(self.step_layer, key_states, value_states):
            self.leave()
        new = self._encoded(key_states, 0), self._encoded(value_states, 1)
        stop = self.length + tokens
        if self.rows is not None:
            self._write_apart(new, stop)
            self.rows = [length + tokens for length in self.rows]
        elif self.step_layer is None:
            self._kept = [torch.cat([kept, states], dim=2) for kept, states in zip(self._kept, new, strict=True)]
        else:
            for buffer, states in zip((self.step_layer.keys, self.step_layer.values), new, strict=True):
                buffer.narrow(2, self.length, tokens).copy_(states)
        self.length = stop
        keys, values = self._used(0), self._used(1)
        if self.bits is None:
            return keys, values
        shape = keys.shape[0], keys.shape[1], stop
        return Held(shape, self.sizes, self.dtypes, keys.device, self.bits, lambda: iter([(keys, values)])).states()

    def _fits(self, layer: StepLayer, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        keys: Any = layer.keys
        gradients = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        return (
            not gradients
            and key_states.shape[:2] == value_states.shape[:2] == keys.shape[:2]
            and (key_states.shape[3], value_states.shape[3]) == self.sizes
            and (self.bits is not None or (key_states.dtype, value_states.dtype) == self.dtypes)
            and self.length + key_states.shape[2] <= keys.shape[2]
        )

    def _write_apart(self, new: tuple[torch.Tensor, torch.Tensor], stop: int) -> None:
        """Write states behind the end of each row, which have different lengths."""
        rows: Any = self.rows
        device, tokens = new[0].device, new[0].shape[2]
        columns = (torch.tensor(rows)[:, None] + torch.arange(tokens)).to(device)
        at = torch.arange(len(rows), device=device)[:, None], columns
        whole: Any
        for part, states in enumerate(new):
            if self.step_layer is None:
                room = states.new_zeros((*states.shape[:2], stop - self._kept[part].shape[2], states.shape[3]))
                self._kept[part] = whole = torch.cat([self._kept[part], room], dim=2)
            else:
                whole = self.step_layer.values if part else self.step_layer.keys
            whole.transpose(1, 2).index_put_(at, states.transpose(1, 2))

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions of every row as filled: a step has written them."""
        self.length += tokens
        if self.rows is not None:
            self.rows = [length + tokens for length in self.rows]

    # ---- leaving the slot

    def leave(self) -> None:
        """Take what is filled along into tensors of the layer's own: the buffers are for others from now on."""
        if self.step_layer is not None:
            self._kept = [self._used(0).clone(), self._used(1).clone()]
        self.slot = self.step_layer = None

    # ---- lengths

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def columns(self, tokens: int) -> tuple[int, int]:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        return 0, self.length + tokens

    def row_lengths(self, rows: int) -> list[int]:
        return [self.length] * rows if self.rows is None else list(self.rows)

    def set_rows(self, lengths: list[int]) -> None:
        """See `hf_accel.core.calls.cache_layers.RaggedLayer`."""
        self.rows, self.length = list(lengths), max(lengths)
        if self.step_layer is None:
            self._kept = [kept[:, :, : self.length] for kept in self._kept]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every row by moving a counter."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # raises, as stock does
        self.rows, self.length = None, max(0, self.length + tokens_to_remove)
        if self.step_layer is None and self.is_initialized:
            self._kept = [kept[:, :, : self.length] for kept in self._kept]

    def reset(self) -> None:
        """Forget everything, as before the first token."""
        self.slot = self.step_layer = None
        self._kept, self.length, self.rows, self.is_initialized = [None, None], 0, None, False

    # ---- rows of the batch

    def rows_stay(self, rows: int) -> str | None:
        """See `hf_accel.core.calls.cache_layers.LeavingLayer`: another number of rows would be another capture."""
        return "steps over fixed buffers are captured for all rows"

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda used: used.index_select(0, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda used: used.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda used: used[indices, ...])

    def _select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.length:
            self.leave()
            self._kept, self.rows = [choose(kept) for kept in self._kept], None


class WindowCallLayer(CallLayer, DynamicSlidingWindowLayer):
    """A layer with a sliding window: it keeps all positions, masks hide them, and who asks is shown those in it."""

    is_sliding = True

    def __init__(self, slot: Any, index: int, window: int) -> None:
        super().__init__(slot, index, window)
        self.sliding_window = window
        self.record_past = False
        self._sliding_window_tensor = torch.tensor(window)

    def _dense(self, part: int) -> Any:
        found = super()._dense(part)
        return found if found is None or self.record_past else found[:, :, -self.sliding_window + 1 :]
