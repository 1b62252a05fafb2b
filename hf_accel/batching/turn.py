"""One forward pass of a model at a time: whose turn it is.

Threads that run passes side by side take the memory's rate and the cores from one another, and their teams of workers
wait for cores that the other team has. So a pass waits for its turn. Steps of those who write and passes over prompts
go by turns, so that nobody's tokens wait for more than one chunk of a prompt; prompts in the order of their calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class _Ticket(NamedTuple):
    is_step: bool
    number: int  # of the call, in the order of arrival


class Turn:
    """A lock for passes. A thread that has it may ask for it again."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._owner: int | None = None
        self._waiting: list[_Ticket] = []
        self._last_was_step = False

    @contextmanager
    def taken(self, number: int, *, is_step: bool = False) -> Iterator[None]:
        """Wait for the turn and have it for the length of the block. number: of the call, in the order of arrival."""
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        ticket = _Ticket(is_step, number)
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._owner is None and self._next() is ticket)
                self._owner = me
            finally:  # also where the wait is interrupted
                self._waiting = [other for other in self._waiting if other is not ticket]
                if self._owner != me:
                    self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._owner, self._last_was_step = None, is_step
                self._changed.notify_all()

    def _next(self) -> _Ticket:
        steps = [ticket for ticket in self._waiting if ticket.is_step]
        others = [ticket for ticket in self._waiting if not ticket.is_step]
        if steps and not (others and self._last_was_step):
            return steps[0]
        return min(others, key=lambda ticket: ticket.number)
