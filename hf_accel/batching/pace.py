"""What steps and prompts take here, and what follows for a bound on the time between two tokens."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable

KEPT = 32  # latest times per number of rows
LEAST_CHUNK = 16
MEETING_S = 0.0002  # until it is measured


class Pace:
    """Times of steps by their rows, in seconds, and of tokens of prompts."""

    def __init__(self, latency_s: float | None, max_rows: int, chunk_tokens: int) -> None:
        self.latency_s, self._max_rows, self._chunk_tokens = latency_s, max_rows, chunk_tokens
        self._steps: dict[int, deque[float]] = {}
        self._per_token: deque[float] = deque(maxlen=KEPT)
        self._meeting: deque[float] = deque([MEETING_S], maxlen=KEPT)
        self._is_given_up = False

    def step(self, rows: int, seconds: float) -> None:
        """Note what a step of so many rows took."""
        self._steps.setdefault(rows, deque(maxlen=KEPT)).append(seconds)

    def between(self, rows: int, seconds: float) -> None:
        """Note the time between two steps of so many rows, in which threads change and choose their tokens."""
        self._meeting.append(seconds / rows)

    def give_up(self) -> None:
        """Let no steps be made for several calls at once any more: one failed."""
        self._is_given_up = True

    def merges(self, calls: int) -> bool:
        """Return whether a step for so many calls at once takes less than a step for each: not for very small models.

        Both as measured, with what it takes to bring threads together; until both are known, they are.
        """
        if self._is_given_up:
            return False
        one, all_at_once = self.step_s(1), self.step_s(calls)
        if one is None or all_at_once is None:
            return True
        return one * calls > all_at_once + calls * statistics.median(self._meeting)

    def prompt(self, tokens: int, seconds: float) -> None:
        """Note what a pass over so many tokens of a prompt took."""
        if tokens >= LEAST_CHUNK:
            self._per_token.append(seconds / tokens)

    def step_s(self, rows: int, summary: Callable[[Iterable[float]], float] = statistics.median) -> float | None:
        """Return what a step of so many rows takes, by the nearest number that was measured; None: unknown.

        summary: of the times that were. Of more rows than were measured it is taken to take as long per row as of the
        most that were.
        """
        counts = list(self._steps)
        if not counts or (rows > 1 and max(counts) == 1):
            return None
        known = min((count for count in counts if count >= rows), default=max(counts))
        return summary(self._steps[known]) * max(1.0, rows / known)

    def most_rows(self) -> int:
        """Return how many rows may run at once: as many as were seen within the target, and one more to find out."""
        if self.latency_s is None:
            return self._max_rows
        within, beyond = 0, self._max_rows + 1
        for rows in sorted(self._steps):
            if _mostly(self._steps[rows]) <= self.latency_s:
                within = rows
            else:
                beyond = rows
                break
        return max(1, min(self._max_rows, within + 1, beyond - 1))

    def chunk(self, rows: int) -> int:
        """Return how many tokens of a prompt are read between two steps of so many rows; 0: all of them."""
        if not self._chunk_tokens or self.latency_s is None or not self._per_token:
            return self._chunk_tokens
        left = self.latency_s - (self.step_s(rows, _mostly) or 0.0) - rows * _mostly(self._meeting)
        return max(LEAST_CHUNK, min(self._chunk_tokens, int(left / _mostly(self._per_token))))


def _mostly(times: Iterable[float]) -> float:
    """Return what nine in ten of the times stay within: a target is for them, not for half."""
    ordered = sorted(times)
    return ordered[len(ordered) * 9 // 10]
