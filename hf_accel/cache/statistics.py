"""What a model's caches held since it was optimised: for the report."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

MOST_REASONS = 64


class CacheStatistics:
    """Counts over all calls; every method may be called from any thread."""

    def __init__(self) -> None:
        self.caches: Counter[str] = Counter()
        self.not_done: Counter[str] = Counter()
        self.seen = self.kept = 0
        self.peak_bytes: Mapping[str, int] = {}  # of the latest call with tiers, as it goes on
        self.notes: list[str] = []
        self.prefixes: Callable[[], Any] | None = None
        self._lock = threading.Lock()

    def made(self, what: str) -> None:
        """Count a cache of a call."""
        with self._lock:
            self.caches[what] += 1

    def skipped(self, reason: str) -> None:
        """Count something that was asked for in general and could not be done in a call."""
        with self._lock:
            # some name numbers of the call's config, of which there may be any
            is_one_more = reason not in self.not_done and len(self.not_done) >= MOST_REASONS
            self.not_done["other reasons" if is_one_more else reason] += 1

    def evicted(self, seen: int, kept: int) -> None:
        """Count tokens of a row and head before and after positions were given up."""
        with self._lock:
            self.seen += seen
            self.kept += kept

    def watch(self, peak_bytes: Mapping[str, int], notes: list[str]) -> None:
        """Follow the tiers of a call."""
        self.peak_bytes, self.notes = peak_bytes, notes

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        prefixes = self.prefixes() if self.prefixes else None
        with self._lock:
            return {
                "caches": dict(self.caches),
                "not_done": dict(self.not_done),
                "compression": round(self.seen / self.kept, 3) if self.kept else None,
                "peak_bytes": dict(self.peak_bytes),
                "notes": list(self.notes),
                "prefixes": prefixes,
            }

    def __str__(self) -> str:
        lines = [", ".join(f"{count} x {what}" for what, count in self.caches.items()) or "no calls yet"]
        if self.kept:
            lines.append(f"evictions left 1 of {self.seen / self.kept:.1f} tokens")
        if self.peak_bytes:
            peaks = ", ".join(f"{size:,} B {tier}" for tier, size in self.peak_bytes.items())
            lines.append(f"most that the last call held: {peaks}")
        if self.prefixes and (counts := self.prefixes()):
            lines.append(
                f"prefixes: {counts['hits']} calls hit, {counts['misses']} missed, {counts['reused_tokens']} tokens "
                f"reused, {counts['bytes']:,} bytes held, {counts['crossings']} crossings between tenants"
            )
        lines += self.notes
        lines += [f"{count} x without: {reason}" for reason, count in self.not_done.items()]
        return "\n".join(lines)
