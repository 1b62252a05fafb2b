"""What became of rows that ended before their batch, over all calls: for the report."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any


class RowsLeft:
    """Counts over all calls; every method may be called from any thread."""

    def __init__(self) -> None:
        self.rows = self.saved = self.freed = 0
        self.stayed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, rows: int, saved: int, freed: int) -> None:
        """Count the rows that left a call, rows that its passes were spared and bytes of the cache freed meanwhile."""
        with self._lock:
            self.rows += rows
            self.saved += saved
            self.freed += freed

    def stay(self, reason: str) -> None:
        """Count a call in which rows ended and stayed."""
        with self._lock:
            self.stayed[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        with self._lock:
            counts = {"left": self.rows, "row_steps_saved": self.saved, "bytes_freed": self.freed}
            return {**counts, "stayed": dict(self.stayed)}

    def __str__(self) -> str:
        lines = [
            f"{self.rows} left their batch, {self.saved:,} row-steps saved, {self.freed:,} bytes freed before its end"
        ]
        lines += [f"{count} x stayed: {reason}" for reason, count in self.stayed.items()]
        return "\n".join(lines)
