"""Buffers of fixed addresses for the caches of one model and of those that draft for it, one call at a time.

What is captured reads and writes these addresses, so buffers outlive the caches that fill them: a call's cache borrows
a slot, and what it still holds when another call takes the slot is moved out for whoever kept that cache.
Memory: keys and values of B·C positions per slot, C by `capacity_for`; at most `MOST` slots.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from hf_accel.compilation.step_layers import Fill, StepLayer
from hf_accel.ops import cached

BUCKETS = (256, 1024, 4096)  # beyond, powers of two
MOST = 8
SPARE = 16  # columns behind what a call expects, which steps of several tokens may fill with filler


def capacity_for(tokens: int) -> int:
    """Return the columns of the buffers for a call of `tokens`, prompt and new ones."""
    needed = tokens + SPARE
    return next((bucket for bucket in BUCKETS if needed <= bucket), 1 << (needed - 1).bit_length())


def empty(buffers: list[torch.Tensor]) -> None:
    """Let buffers hold zeros: what was written before might be no numbers, and hidden columns are read at times."""
    if buffers:
        torch._foreach_zero_(buffers)  # in few launches, while the device has nothing else to do


def _nobody() -> None:
    return None


class Lent:
    """What the cache of a call has for the length of the call: `owner` and `request` return both while they exist."""

    def __init__(self) -> None:
        self.owner: Callable[[], Any] = _nobody
        self.request: Callable[[], Any] = _nobody

    def lend(self, cache: Any, request: Any) -> None:
        """Give this to a cache of the call `request`."""
        self.owner, self.request = weakref.ref(cache), weakref.ref(request)

    def release(self) -> None:
        """Note that the call is over: who keeps its cache has what it holds until this is given to another."""
        self.request = _nobody

    def evict(self) -> None:
        """Let the cache that has this, if somebody kept it, take along what it holds."""
        if (cache := self.owner()) is not None:
            for layer in cache.layers:
                if hasattr(layer, "leave"):
                    layer.leave()

    def is_in_use(self) -> bool:
        """Return whether the call that took this goes on with its cache."""
        return self.owner() is not None and self.request() is not None

    def given(self) -> Any:
        """Return what a cache layer of the call is to have for its buffers, now that it is given its first states."""
        return self


class Slot(Lent):
    """The buffers of one cache.

    rows: B. capacity: C. on_device: the values of `fill.lengths`, as far as the host has queued them; None: unknown.
    expected: tokens of a row that the call expects, prompt and new ones.
    graphs: what was captured over these buffers; seen: how many steps there were, both by who made them and of how many
    tokens.
    """

    def __init__(self, rows: int, capacity: int, bits: int | None, device: torch.device) -> None:
        super().__init__()
        self.rows, self.capacity, self.device = rows, capacity, device
        self.fill = Fill(rows, bits, device)
        self.on_device: list[int] | None = None
        self.expected = 0
        self.layers: dict[int, StepLayer] = {}
        self.graphs: dict[Any, Any] = {}
        self.seen: Counter[Any] = Counter()

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def buffers(self) -> list[Any]:
        """Return all buffers."""
        return [buffer for layer in self.layers.values() for buffer in (layer.keys, layer.values)]

    def layer(self, index: int, window: int | None, keys: torch.Tensor, values: torch.Tensor) -> StepLayer | None:
        """Return layer `index` with buffers for states like `keys` and `values`; None if it has others already."""
        if keys.shape[0] != self.rows:
            return None
        found = self.layers.get(index)
        sizes, dtypes = (keys.shape[3], values.shape[3]), (keys.dtype, values.dtype)
        if found is None:
            buffers = self._buffer(keys), self._buffer(values)
            found = self.layers[index] = StepLayer(self.fill, *buffers, sizes, dtypes, window)
        kept: Any = found.keys
        if not kept.shape[1] == keys.shape[1] == values.shape[1]:
            return None
        return found if (found.sizes, found.dtypes, found.sliding_window) == (sizes, dtypes, window) else None

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        heads, size, bits = like.shape[1], like.shape[3], self.fill.bits
        row, dtype = (size, like.dtype) if bits is None else (cached.row_bytes(bits, size), torch.uint8)
        with torch.inference_mode(False):
            return torch.zeros((self.rows, heads, self.capacity, row), dtype=dtype, device=like.device)

    def set_lengths(self, lengths: list[int]) -> None:
        """Let the device take row b to be filled up to lengths[b], without waiting for it."""
        if lengths == self.on_device:
            return
        if min(lengths) == max(lengths):
            self.fill.lengths.fill_(lengths[0])
        else:
            self.fill.lengths.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)
        self.on_device = list(lengths)

    def advanced(self, tokens: int) -> None:
        """Note that a step has advanced the lengths on the device."""
        if self.on_device is not None:
            self.on_device = [length + tokens for length in self.on_device]

    def prepare(self, cache: Any, request: Any, expected: int, starts: torch.Tensor | None) -> None:
        """Give the slot to a cache of the call `request`; starts: [B], the first column of each row that counts."""
        self.evict()
        self.lend(cache, request)
        self.expected = expected
        empty(self.buffers())
        self.on_device = None
        if starts is None:
            self.fill.starts.zero_()
        else:
            self.fill.starts.copy_(starts)


class Slots:
    """The slots of one model, and of those that draft for it.

    shared: those that several calls have rows of, of `hf_accel.compilation.shared`; they stand in no call's way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shared: list[Any] = []
        self._slots: OrderedDict[tuple[int, int, int, int | None], Slot] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return sum(slot.bytes for slot in [*self._slots.values(), *self.shared])

    def is_in_use(self) -> bool:
        """Return whether a call has a slot of its own."""
        with self._lock:
            return any(slot.is_in_use() for slot in self._slots.values())

    def release(self, request: Any) -> None:
        """Note that a call is over, as `Lent.release` does."""
        with self._lock:
            for slot in self._slots.values():
                if slot.request() is request:
                    slot.release()

    def take(
        self,
        cache: Any,
        request: Any,
        rows: int,
        expected: int,
        bits: int | None = None,
        starts: torch.Tensor | None = None,
        model: int = 0,
    ) -> Slot | None:
        """Return the slot for a new cache; None while another call has one: what is captured shares its memory.

        model: which of the models that run in one call the cache is for.
        """
        key = model, rows, capacity_for(expected), bits
        with self._lock:
            if any(
                slot.is_in_use() and (other == key or slot.request() is not request)
                for other, slot in self._slots.items()
            ):
                return None
            slot = self._slots.pop(key, None) or Slot(rows, key[2], bits, self.device)
            slot.prepare(cache, request, expected, starts)
            self._slots[key] = slot
            while len(self._slots) > MOST:
                self._slots.popitem(last=False)
            return slot

    def free_others(self, slot: Slot) -> None:
        """Give up the buffers of all other slots, and what was captured over them."""
        with self._lock:
            for key in [key for key, other in self._slots.items() if other is not slot]:
                other = self._slots.pop(key)
                other.evict()
                other.graphs.clear()
                other.layers.clear()

    def forget_captures(self) -> None:
        """Give up everything that was captured: the model is no longer what it was."""
        with self._lock:
            firsts = [first for slot in list(self.shared) for first in list(slot.firsts.values())]
            for slot in [*self._slots.values(), *firsts]:
                slot.graphs.clear()
                slot.seen.clear()
