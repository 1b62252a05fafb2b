"""Asks the disk early for the experts that the next layer's router is likely to choose.

The router is given what this layer's experts are given: hidden states change little from layer to layer (Eliseev and
Mazur 2023, arXiv:2312.17238, section 3.2). Only the system's page cache is filled, so that a wrong guess takes no slot.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.stored import StoredExperts

MOST_ROWS = 16  # of a call: prompts want nearly all experts
_MOST_WAITING = 64  # experts


class ReadAhead:
    """Guesses for each module of experts what the next one will read, with a thread that asks the disk for it."""

    def __init__(
        self, slots: Slots, stored: Sequence[StoredExperts], routers: Sequence[Tensor | None], most: int
    ) -> None:
        """Take the weights of the routers [experts, E], None where there is none, and the experts of a token."""
        self._slots, self._most = slots, most
        self._next = {id(one): (other, router) for one, other, router in zip(stored, stored[1:], routers[1:])
                      if router is not None}  # fmt: skip
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        Thread(target=_work, args=(self._queue,), daemon=True, name="hf_accel read-ahead").start()
        self.close = weakref.finalize(self, self._queue.put, None)
        self.asked = 0

    @torch.no_grad()
    def expect(self, stored: StoredExperts, hidden: Tensor) -> None:
        """Guess from what a module of experts is given, hidden [T, E]."""
        found = self._next.get(id(stored))
        if found is None or len(hidden) > MOST_ROWS or not self._slots.is_slow or self._queue.qsize() > _MOST_WAITING:
            return
        other, router = found
        if router.dtype is not hidden.dtype:
            router = router.to(hidden.dtype)
        guessed = (hidden @ router.T).topk(self._most, dim=-1).indices.unique().tolist()
        for expert in self._slots.absent(other, guessed):
            self.asked += 1
            self._queue.put(partial(self._slots.file.expect, other.extents[expert]))


def _work(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (ask := queue.get()) is not None:
        ask()
        del ask  # it holds the file, which a model that is dropped is to close


def router_of(parent: nn.Module, experts: int, hidden: int) -> Any:
    """Return the weight [experts, hidden] of the router beside a module of experts, None if there is no single one."""
    found = [p for p in parent.parameters() if p.shape == (experts, hidden)]
    return found[0] if len(found) == 1 else None
