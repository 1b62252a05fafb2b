"""What steps cost on this machine: a step of several tokens against one of a single token, and drafting a token.

Measured once on the model when speculation is set up, then followed while it runs. Only ratios decide, and medians, as
machines are noisy.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
RECENT = 7  # passes of a width that its median is taken over
REFRESH = 4  # passes after which medians are taken anew
SHORT_S = 0.25  # passes that take less in all are timed again, as noise is large among them


def settle(seconds: dict[int, float], again: Callable[[int], None], rounds: int = 2) -> None:
    """Remove what noise has added to the seconds by rows, of which `again(rows)` times one more pass.

    Short passes are all timed again, of long ones those that take longer than a wider one or more per row than a
    narrower one. No more rows can take less time, so in the end none does.
    """
    points = sorted(seconds)
    is_short = sum(seconds.values()) < SHORT_S
    for _ in range(rounds):
        for rows in points:
            wider = [seconds[point] for point in points if point > rows]
            narrower = [seconds[point] / point for point in points if point < rows]
            is_slow = seconds[rows] > min(wider, default=math.inf)
            if is_short or is_slow or seconds[rows] / rows > min(narrower, default=math.inf):
                again(rows)
    for rows, next_rows in zip(points[-2::-1], points[:0:-1], strict=True):
        seconds[rows] = min(seconds[rows], seconds[next_rows])


@dataclass
class RowCosts:
    """Seconds of a forward pass by the number of its rows (batch x tokens), measured at some of them."""

    seconds: dict[int, float]

    @classmethod
    def measure(cls, forward: Callable[[int], object], highest: int, rounds: int = 2) -> RowCosts:
        """Time `forward(rows)` at numbers of rows up to `highest`; the least of `rounds` runs, in alternation.

        No more rows are tried once a step costs six times that of a single row: drafts never pay there.
        """
        points = [rows for rows in ROWS if rows <= max(highest, 1)]
        best: dict[int, float] = {}
        for _ in range(rounds):
            for rows in list(points):
                start = time.perf_counter()
                forward(rows)
                best[rows] = min(best.get(rows, float("inf")), time.perf_counter() - start)
                if best[rows] > 6 * best[1]:
                    points = [point for point in points if point < rows]
                    break
        return cls(best)

    def ratio(self, rows: int, to: int) -> float:
        """Return how many times longer `rows` rows take than `to` rows; linear between and beyond measured points."""
        return self.at(rows) / self.at(to)

    def at(self, rows: int) -> float:
        points = sorted(self.seconds)
        if rows in self.seconds or len(points) == 1:
            return self.seconds.get(rows, self.seconds[points[0]] * max(1.0, rows / points[0]))
        index = min(max(bisect.bisect_left(points, rows), 1), len(points) - 1)
        low, high = points[index - 1], points[index]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return max(self.seconds[low] + slope * (rows - low), 1e-9)


@dataclass
class StepCosts:
    """Seconds of the steps of one call at its batch size and context: what was seen, else what the ratios say."""

    rows: RowCosts
    batch: int
    _seen: dict[int, deque[float]] = field(default_factory=dict)
    _scales: deque[float] = field(default_factory=lambda: deque(maxlen=2 * RECENT + 1))
    _known: dict[int, float] = field(default_factory=dict)  # estimates in use, made anew every few steps
    _ratios: dict[int, float] = field(default_factory=dict)
    _age: int = 0

    def __post_init__(self) -> None:
        self._scales.extend([self.rows.at(self.batch)] * 2)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a forward pass of `tokens` tokens per row."""
        self._seen.setdefault(tokens, deque(maxlen=RECENT)).append(seconds)
        self._scales.append(seconds / self._ratio(tokens))
        self._age += 1
        if self._age % REFRESH == 0 or tokens not in self._known:
            self._known.clear()

    def step(self, tokens: int) -> float:
        """Return the seconds of a forward pass of `tokens` tokens per row."""
        if tokens not in self._known:
            seen = self._seen.get(tokens)
            if seen is not None and len(seen) >= 3:
                self._known[tokens] = statistics.median(seen)
            else:
                self._known[tokens] = statistics.median(self._scales) * self._ratio(tokens)
        return self._known[tokens]

    def _ratio(self, tokens: int) -> float:
        if tokens not in self._ratios:
            self._ratios[tokens] = self.rows.ratio(self.batch * tokens, self.batch)
        return self._ratios[tokens]
