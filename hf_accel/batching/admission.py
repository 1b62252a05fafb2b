"""Who may begin: rows that run at once and the positions of their caches are bounded, and whoever comes waits.

First come first served. A call that fits goes ahead of an earlier one that does not, but no call is passed more than
`PASSED` times: then the others wait, until there is room for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from hf_accel.core.calls.doors import SharedBuffers
from hf_accel.errors import ConfigError

PASSED = 8
LOOK_S = 0.1  # how often one who waits looks whether it is still wanted


@dataclass(eq=False)
class Place:
    """What one call takes up. number: of the call, in the order of arrival. passed: how many went ahead of it.

    buffers: what holds those of its cache, where there must be room, too; joins: whether it shares them.
    """

    rows: int
    tokens: int
    number: int
    buffers: SharedBuffers | None = None
    joins: bool = False
    passed: int = 0
    is_inside: bool = False


class Admission:
    """Counts the rows and positions of the calls that run.

    most_rows: returns how many rows may run at once at present. max_rows, max_tokens: what a single call may take.
    """

    def __init__(self, max_rows: int, max_tokens: int | None, most_rows: Callable[[], int]) -> None:
        self.max_rows, self.max_tokens, self._most_rows = max_rows, max_tokens, most_rows
        self._changed = threading.Condition()
        self._waiting: list[Place] = []
        self.rows = self.tokens = self._count = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enter(
        self,
        rows: int,
        tokens: int,
        check: Callable[[], None],
        buffers: SharedBuffers | None = None,
        *,
        joins: bool = False,
    ) -> Place:
        """Wait for room, and return the place. check: raises where the call is no longer wanted; others as of `Place`.

        Raises:
            ConfigError: the call can never have room.
        """
        if rows > self.max_rows or (self.max_tokens is not None and tokens > self.max_tokens):
            raise ConfigError(
                f"This call has {rows} rows and may come to {tokens} positions in its cache; BatchingConfig admits "
                f"max_rows={self.max_rows} and max_tokens={self.max_tokens}, so that it could never begin. Ask for "
                "fewer new tokens or rows, or raise the bounds."
            )
        with self._changed:
            self._count += 1
            place = Place(rows, tokens, self._count, buffers, joins)
            self._waiting.append(place)
            try:
                while not self._may_enter(place):
                    self._changed.wait(LOOK_S)
                    check()
                for other in self._waiting[: self._waiting.index(place)]:
                    other.passed += 1
                if buffers is not None:
                    buffers.reserve(joins)
                self.rows, self.tokens, place.is_inside = self.rows + rows, self.tokens + tokens, True
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()
        return place

    def shrink(self, place: Place, rows: int) -> None:
        """Give up what rows took that have left: `rows` are left."""
        with self._changed:
            tokens = place.tokens * rows // place.rows
            self.rows, self.tokens = self.rows + rows - place.rows, self.tokens + tokens - place.tokens
            place.rows, place.tokens = rows, tokens
            self._changed.notify_all()

    def leave(self, place: Place) -> None:
        """Give the place up."""
        with self._changed:
            self.rows, self.tokens = self.rows - place.rows, self.tokens - place.tokens
            self._changed.notify_all()

    def _may_enter(self, place: Place) -> bool:
        earlier = self._waiting[: self._waiting.index(place)]
        return self._has_room(place) and not any(other.passed >= PASSED or self._has_room(other) for other in earlier)

    def _has_room(self, place: Place) -> bool:
        if self.max_tokens is not None and self.tokens + place.tokens > self.max_tokens:
            return False
        if not self.rows:
            return True
        has_buffers = place.buffers is None or place.buffers.has_room(place.joins)
        return has_buffers and self.rows + place.rows <= min(self.max_rows, self._most_rows())
