"""Buffers of fixed addresses that several calls have rows of, so that one replay makes a step of all of them.

Captured are steps of the first 1, 2, 4, ... rows, over views of the same buffers. A step writes to every row that it
has, also to those of nobody and of calls that take no part: behind the end of what these hold, where their own next
token overwrites it before anybody sees it. Memory: keys and values of N·C positions, made as layers are first seen.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from hf_accel.compilation.slots import Lent, Slot, empty
from hf_accel.compilation.step_layers import StepLayer

UNKNOWN = -1
OFTEN = 64  # steps


class SharedSlot:
    """The buffers of N rows. taken: which rows calls have, or their caches where somebody kept those.

    on_device: the lengths of all rows on the device, as far as the host has queued them; `UNKNOWN` where it has not.
    firsts: the first r rows as slots of their own, by r. is_short: whether there was no memory for the buffers.
    """

    def __init__(self, rows: int, capacity: int, bits: int | None, device: torch.device) -> None:
        self.whole = Slot(rows, capacity, bits, device)
        self.rows, self.capacity, self.bits = rows, capacity, bits
        self.on_device, self._starts = [0] * rows, [0] * rows
        self.firsts: dict[int, FirstRows] = {}
        self.taken: list[SharedRows] = []
        self.is_short = False
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return self.whole.bytes

    def is_in_use(self) -> bool:
        """Return whether a call has rows of it."""
        return any(taken.is_in_use() for taken in self.taken)

    def place_for(self, rows: int) -> int | None:
        """Return the lowest row from which so many are free, None if there is none."""
        first = 0
        for taken in sorted((taken for taken in self.taken if taken.is_in_use()), key=lambda taken: taken.first):
            if taken.first - first >= rows:
                break
            first = taken.stop
        return first if first + rows <= self.rows and not self.is_short else None

    def take(self, rows: int, cache: Any, request: Any, expected: int) -> SharedRows | None:
        """Return the lowest free rows for a cache of the call `request`, to be prepared; None if there are none."""
        with self._lock:
            first = self.place_for(rows)
            if first is None:
                return None
            found = SharedRows(self, first, rows, expected)
            found.lend(cache, request)
            self.taken = [taken for taken in self.taken if taken.owner() is not None] + [found]
            return found

    def prepare(self, rows: SharedRows, starts: torch.Tensor | None) -> None:
        """Let rows be empty, and whoever kept a cache that had some of them take it along; starts: as of `Slot`."""
        for taken in self.taken:
            if taken is not rows and taken.first < rows.stop and rows.first < taken.stop:
                taken.evict()
        with self._lock:
            self.taken = [taken for taken in self.taken if taken.is_in_use() or taken.length()]
        empty([buffer[rows.first : rows.stop] for buffer in self.whole.buffers()])
        begins = torch.zeros(rows.rows, dtype=torch.int32) if starts is None else starts.to(torch.int32)
        self._starts[rows.first : rows.stop] = begins.tolist()
        rows.fill.starts.copy_(begins, non_blocking=True)

    def first(self, stop: int) -> FirstRows:
        """Return the first rows that a step of the first `stop` rows is made over.

        A step of more rows than needed takes little longer, and a capture as long as many steps: so what is captured
        anew has the rows of all calls, and steps are captured over fewer where they were asked for often.
        """
        exact = self._first(stop)
        exact.asked += 1
        if exact.graphs:
            return exact
        captured = [first for rows, first in sorted(self.firsts.items()) if rows > exact.rows and first.graphs]
        if captured:
            return exact if exact.asked > OFTEN else captured[0]
        return self._first(max([stop, *(taken.stop for taken in self.taken if taken.is_in_use())]))

    def _first(self, stop: int) -> FirstRows:
        rows = min(1 << (stop - 1).bit_length(), self.rows)
        found = self.firsts.get(rows)
        if found is None or len(found.layers) < len(self.whole.layers):
            found = self.firsts[rows] = FirstRows(self, rows)
        return found

    def lengths_beside(self, live: dict[int, int], rows: int) -> list[int]:
        """Return the lengths of the first `rows` rows for a step of one token of those that are `live`.

        live: the length of each. The others are written to behind what somebody has in them, and where the device is
        already if that is no less, so that it need not be told.
        """
        held = [0] * self.rows
        for taken in self.taken:
            if (length := taken.length()) >= self.capacity and taken.first not in live:
                taken.evict()  # nothing can be written behind it
            elif length:
                held[taken.first : taken.stop] = [max(length, other) for other in held[taken.first : taken.stop]]
        found = []
        for row, now in enumerate(self.on_device[:rows]):
            least = max(held[row], self._starts[row])  # where no column is seen, attention gives no numbers
            found.append(live.get(row, now if least <= now < self.capacity else least))
        return found


class FirstRows(Slot):
    """The first rows of a shared slot, as a slot that steps are captured over.

    asked: how many steps needed no more rows. orders: of the latest step the rows that took part, and on the device
    which row of the inputs each row took in, and which of its rows the outputs were.
    """

    def __init__(self, shared: SharedSlot, rows: int) -> None:
        self._lengths, self.asked = shared.on_device, 0
        self.orders: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None
        super().__init__(rows, shared.capacity, shared.bits, shared.whole.device)
        with torch.inference_mode(False):
            own = slice(0, rows)
            self.fill = shared.whole.fill.of(own)
            self.layers = {index: layer.of(self.fill, own) for index, layer in shared.whole.layers.items()}

    @property
    def on_device(self) -> list[int] | None:  # type: ignore[override]
        return self._lengths[: self.rows]

    @on_device.setter
    def on_device(self, lengths: list[int] | None) -> None:
        self._lengths[: self.rows] = [UNKNOWN] * self.rows if lengths is None else lengths


class SharedRows(Lent):
    """The rows [first, stop) of a shared slot that one call has: what the layers of its cache have for their slot."""

    def __init__(self, shared: SharedSlot, first: int, rows: int, expected: int) -> None:
        super().__init__()
        self.shared, self.first, self.stop, self.rows, self.expected = shared, first, first + rows, rows, expected
        self.fill = shared.whole.fill.of(slice(first, first + rows))

    def layer(self, index: int, window: int | None, keys: torch.Tensor, values: torch.Tensor) -> StepLayer | None:
        """See `Slot.layer`; None, too, where there is no memory for the rows of all."""
        whole = self.shared.whole
        if keys.shape[0] != self.rows:
            return None
        likes = [states[:1, :, :0].expand(whole.rows, -1, -1, -1) for states in (keys, values)]
        try:
            found = whole.layer(index, window, likes[0], likes[1])
        except torch.OutOfMemoryError:
            self.shared.is_short = True
            return None
        return None if found is None else found.of(self.fill, slice(self.first, self.stop))

    def length(self) -> int:
        """Return how many columns of its rows are somebody's."""
        layers = getattr(self.owner(), "layers", [])
        return max((layer.length for layer in layers if getattr(layer, "slot", None) is self), default=0)
