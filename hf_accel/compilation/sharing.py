"""Which calls share buffers while calls join, and which has buffers of its own: known when a call may begin.

A cache is made before it is known whether its call joins others, and whether it has to wait for room. Until then its
layers have a claim. Calls that join are given rows of shared buffers; of all others one at a time has a slot, as
without joining.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import Any

import torch

from hf_accel.compilation.shared import SharedRows, SharedSlot
from hf_accel.compilation.slots import Slots, capacity_for
from hf_accel.compilation.statistics import CompilationStatistics
from hf_accel.core.calls.call import NewCache, Request
from hf_accel.core.calls.doors import CacheMaker

TAKEN = "another call has the buffers"
NO_ROWS = "there are no rows for it in the buffers that calls share"
POSITIONS = 65536  # of all rows of shared buffers, as far as a single call does not need more


class Sharing:
    """Gives calls rows of shared slots, or slots of their own.

    rows: the most of one shared slot; 0: no steps are captured for several calls. positions: N·C of one at most.
    """

    def __init__(self, slots: Slots, statistics: CompilationStatistics, rows: int, positions: int | None) -> None:
        self.slots, self.statistics = slots, statistics
        self.rows, self.positions = rows, positions or POSITIONS
        self.lock = threading.RLock()
        self.beside: weakref.WeakSet[Claim] = weakref.WeakSet()  # who has, or is about to have, a slot of its own
        self._claims: weakref.WeakKeyDictionary[Any, Claim] = weakref.WeakKeyDictionary()

    def claim(
        self, new: NewCache, request: Request, bits: int | None, starts: torch.Tensor | None, before: CacheMaker | None
    ) -> Claim:
        """Return what stands for the buffers of a cache until its call may begin.

        before: who makes caches where there are no buffers.
        """
        self._claims[new.cache] = found = Claim(self, new, request, bits, starts, before)
        return found

    def claim_of(self, cache: Any) -> Claim | None:
        """Return the claim of a new cache; None where it was given none: its steps cannot be captured."""
        found = None if cache is None else self._claims.get(cache)
        return None if found is None or found.is_settled else found

    def group_of(self, cache: Any) -> SharedSlot | None:
        """See `hf_accel.core.calls.doors.Sharing`."""
        rows = getattr(next(iter(cache.layers), None), "slot", None)
        return rows.shared if isinstance(rows, SharedRows) else None

    def slot_with_room(self, claim: Claim) -> SharedSlot | None:
        """Return the slot to give rows of, made if need be; None while all that would do are full.

        That of the longest rows has what most calls fit in, and only calls of one slot are served by one replay.
        """
        fitting = [slot for slot in self.slots.shared if slot.bits == claim.bits and slot.capacity >= claim.capacity]
        for slot in sorted(fitting, key=lambda slot: -slot.capacity):
            if slot.place_for(claim.rows) is not None:
                return slot  # type: ignore[no-any-return]
        if any(slot.capacity == claim.capacity for slot in fitting) or claim.rows > self.rows:
            return None
        rows = max(claim.rows, min(self.rows, self.positions // claim.capacity))
        made = SharedSlot(rows, claim.capacity, claim.bits, self.slots.device)
        self.slots.shared = [slot for slot in self.slots.shared if slot.is_in_use()] + [made]
        return made


class Claim:
    """Stands for the buffers of one cache until its call may begin. See `hf_accel.core.calls.doors.SharedBuffers`."""

    def __init__(
        self,
        sharing: Sharing,
        new: NewCache,
        request: Request,
        bits: int | None,
        starts: torch.Tensor | None,
        before: CacheMaker | None,
    ) -> None:
        self.sharing, self.bits, self.rows, self.starts = sharing, bits, new.rows, starts
        self.capacity, self.expected = capacity_for(new.expected_tokens), new.expected_tokens
        self.slot: Any = None
        self.is_settled = False
        self._cache, self._request = weakref.ref(new.cache), weakref.ref(request)
        self._before, self._new = before, replace(new, cache=None)
        self._layers = new.cache.layers, new.cache.layer_class_to_replicate

    @property
    def fill(self) -> Claim:
        """What tells layers the bits, as that of a slot does."""
        return self

    def has_room(self, joins: bool) -> bool:
        """See `hf_accel.core.calls.doors.SharedBuffers`."""
        with self.sharing.lock:
            if joins:
                return self.sharing.slot_with_room(self) is not None
            return not self.sharing.beside and not self.sharing.slots.is_in_use()

    def reserve(self, joins: bool) -> None:
        """See `hf_accel.core.calls.doors.SharedBuffers`; nothing is written to the buffers yet."""
        with self.sharing.lock:
            slot = self.sharing.slot_with_room(self) if joins else None
            if slot is not None:
                self.slot = slot.take(self.rows, self._cache(), self._request(), self.expected)
            if self.slot is None:
                self.sharing.beside.add(self)

    def settle(self) -> str | None:
        """See `hf_accel.core.calls.doors.SharedBuffers`."""
        if self.given() is None and (cache := self._cache()) is not None:
            cache.layers, cache.layer_class_to_replicate = self._layers
            if self._before is not None:
                self._before.fill(replace(self._new, cache=cache))
        return None if isinstance(self.slot, SharedRows) else NO_ROWS

    def given(self) -> Any:
        """See `hf_accel.compilation.slots.Lent`; None where there are no buffers."""
        with self.sharing.lock:
            if not self.is_settled:
                self.is_settled = True
                if isinstance(self.slot, SharedRows):
                    self.slot.shared.prepare(self.slot, self.starts)
                else:
                    self.slot = self._own()
            return self.slot

    def _own(self) -> Any:
        cache, request = self._cache(), self._request()
        found = self.sharing.slots.take(cache, request, self.rows, self.expected, self.bits, self.starts)
        if found is None:
            self.sharing.statistics.declined(TAKEN)
        return found

    def release(self) -> None:
        """See `hf_accel.core.calls.doors.SharedBuffers`."""
        with self.sharing.lock:
            self.sharing.beside.discard(self)
            if self.slot is not None:
                self.slot.release()
            if (request := self._request()) is not None:
                self.sharing.slots.release(request)
