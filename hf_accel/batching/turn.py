"""One forward pass of a model at a time: whose turn it is.

Threads that run passes side by side take the memory's rate and the cores from one another, and their teams of workers
wait for cores that the other team has. So a pass waits for its turn. Steps of those who write and passes over prompts
go by turns, so that nobody's tokens wait for more than one chunk of a prompt; prompts in the order of their calls. Who
had the turn last may have it again for `QUANTUM_S`, as changing threads costs more than a pass of a very small model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUANTUM_S = 0.002


class _Ticket:
    def __init__(self, is_step: bool, number: int) -> None:
        self.is_step, self.number = is_step, number
        self.thread = threading.get_ident()
        self.woken = threading.Event()


class Turn:
    """A lock for passes. A thread that has it may ask for it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._waiting: list[_Ticket] = []
        self._last: int | None = None  # the thread that had it last, since when without another between
        self._since = 0.0
        self._last_was_step = False

    @property
    def is_mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner == threading.get_ident()

    @contextmanager
    def taken(self, number: int, *, is_step: bool = False) -> Iterator[None]:
        """Wait for the turn and have it for the length of the block. number: of the call, in the order of arrival."""
        if self.is_mine:
            yield
            return
        ticket = _Ticket(is_step, number)
        try:
            while not self._takes(ticket):
                ticket.woken.wait()
                ticket.woken.clear()
            yield
        finally:  # also where the wait is interrupted
            self._give(ticket)

    def _takes(self, ticket: _Ticket) -> bool:
        with self._lock:
            if ticket not in self._waiting:
                self._waiting.append(ticket)
            if self._owner is not None:
                return False
            is_again = self._last == ticket.thread and time.monotonic() - self._since < QUANTUM_S
            if not is_again and self._next() is not ticket:
                return False
            self._waiting.remove(ticket)
            self._owner = ticket.thread
            if self._last != ticket.thread:
                self._last, self._since = ticket.thread, time.monotonic()
            return True

    def _give(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif self._owner == ticket.thread:
                self._owner, self._last_was_step = None, ticket.is_step
            if self._owner is None and self._waiting:
                self._next().woken.set()

    def _next(self) -> _Ticket:
        steps = [ticket for ticket in self._waiting if ticket.is_step]
        others = [ticket for ticket in self._waiting if not ticket.is_step]
        if steps and not (others and self._last_was_step):
            return steps[0]
        return min(others, key=lambda ticket: ticket.number)
