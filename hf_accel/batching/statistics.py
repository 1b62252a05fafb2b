"""What batching did over all calls, for the report."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

KEPT = 4096  # latest times between two tokens


class BatchingStatistics:
    """Counts of calls, steps and tokens, and the times between two tokens of a call."""

    def __init__(self, latency_s: float | None) -> None:
        self.latency_s = latency_s
        self.joined = self.steps = self.row_steps = self.most_rows = self.cancelled = 0
        self.alone: Counter[str] = Counter()
        self.waits: deque[float] = deque(maxlen=KEPT)  # for admission, seconds
        self.gaps: deque[float] = deque(maxlen=KEPT)  # between two tokens of a call, seconds
        self.tokens = self.tokens_in_time = 0
        self._lock = threading.Lock()

    def began(self, reason: str | None, waited: float) -> None:
        """Count a call. reason: why it runs beside the batch; None: it joined."""
        with self._lock:
            self.waits.append(waited)
            if reason is None:
                self.joined += 1
            else:
                self.alone[reason] += 1

    def stepped(self, rows: int) -> None:
        """Count a step of so many rows."""
        with self._lock:
            self.steps, self.row_steps = self.steps + 1, self.row_steps + rows
            self.most_rows = max(self.most_rows, rows)

    def gap(self, seconds: float) -> None:
        """Count the time between two tokens of a call."""
        with self._lock:
            self.gaps.append(seconds)
            self.tokens += 1
            self.tokens_in_time += self.latency_s is None or seconds <= self.latency_s

    def fell_apart(self, reason: str) -> None:
        """Count a pass for several calls that failed, so that each made its own."""
        with self._lock:
            self.alone[f"a pass for several calls failed ({reason}); calls take turns since"] += 1

    def was_cancelled(self) -> None:
        with self._lock:
            self.cancelled += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the counts; times in ms."""
        with self._lock:
            gaps, waits = sorted(self.gaps), sorted(self.waits)
            return {
                "joined": self.joined,
                "alone": dict(self.alone),
                "cancelled": self.cancelled,
                "steps": self.steps,
                "rows_per_step": self.row_steps / self.steps if self.steps else None,
                "most_rows": self.most_rows,
                "ms_between_tokens": {"p50": _ms(gaps, 0.5), "p95": _ms(gaps, 0.95), "p99": _ms(gaps, 0.99)},
                "ms_waited": {"p50": _ms(waits, 0.5), "p95": _ms(waits, 0.95)},
                "goodput": self.tokens_in_time / self.tokens if self.tokens and self.latency_s else None,
            }

    def __str__(self) -> str:
        found = self.to_dict()
        lines = [f"{found['joined']} calls joined, {sum(self.alone.values())} ran beside the batch"]
        lines += [f"{count} x {reason}" for reason, count in found["alone"].items()]
        if self.steps:
            between = found["ms_between_tokens"]
            lines.append(
                f"{self.steps} steps of {found['rows_per_step']:.1f} rows (at most {self.most_rows}); between two "
                f"tokens of a call {between['p50']:.1f} ms, 95 % within {between['p95']:.1f} ms"
            )
        if found["goodput"] is not None:
            lines.append(f"{100 * found['goodput']:.1f} % of tokens within {1e3 * (self.latency_s or 0):.0f} ms")
        if self.cancelled:
            lines.append(f"{self.cancelled} calls were cancelled")
        return "\n".join(lines)


def _ms(ordered: list[float], share: float) -> float | None:
    return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
