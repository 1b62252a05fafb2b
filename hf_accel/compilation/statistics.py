"""What was captured and replayed since a model was optimised: for the report."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

MOST_REASONS = 64


class CompilationStatistics:
    """Counts over all calls; every method may be called from any thread.

    buffer_bytes: returns the bytes of all fixed buffers.
    """

    def __init__(self, buffer_bytes: Callable[[], int]) -> None:
        self.captures = self.replays = 0
        self.capture_seconds = 0.0
        self.eager: Counter[str] = Counter()  # steps, by reason
        self.calls: Counter[str] = Counter()  # without fixed buffers, by reason
        self._buffer_bytes = buffer_bytes
        self._lock = threading.Lock()

    def captured(self, seconds: float) -> None:
        with self._lock:
            self.captures += 1
            self.capture_seconds += seconds

    def replayed(self) -> None:
        with self._lock:
            self.replays += 1

    def ran_eagerly(self, reason: str) -> None:
        """Count a step that was not replayed."""
        self._add(self.eager, reason)

    def declined(self, reason: str) -> None:
        """Count a call whose cache got no fixed buffers."""
        self._add(self.calls, reason)

    def _add(self, counts: Counter[str], reason: str) -> None:
        with self._lock:
            counts[reason if reason in counts or len(counts) < MOST_REASONS else "other reasons"] += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        with self._lock:
            return {
                "captures": self.captures,
                "capture_seconds": round(self.capture_seconds, 3),
                "replays": self.replays,
                "eager_steps": dict(self.eager),
                "calls_without_buffers": dict(self.calls),
                "buffer_bytes": self._buffer_bytes(),
            }

    def __str__(self) -> str:
        lines = [
            f"{self.captures} captures in {self.capture_seconds:.2f} s, {self.replays} replays, "
            f"{self._buffer_bytes():,} bytes of buffers"
        ]
        lines += [f"{count} steps eager: {reason}" for reason, count in self.eager.items()]
        lines += [f"{count} calls without buffers: {reason}" for reason, count in self.calls.items()]
        return "\n".join(lines)
