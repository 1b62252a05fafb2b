"""What speculation did for a model since it was optimised: for the report."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any


class Statistics:
    """Counts over all calls; every method may be called from any thread."""

    def __init__(self) -> None:
        self.calls = self.steps = self.tokens = self.near_ties = 0
        self.proposed: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.plain: Counter[str] = Counter()
        self._lock = threading.Lock()

    def opened(self) -> None:
        """Count a call that can be speculated in."""
        with self._lock:
            self.calls += 1

    def step(self, tokens: int, steps: int = 1) -> None:
        """Count `steps` forward passes that brought `tokens` tokens of the model's own."""
        with self._lock:
            self.steps += steps
            self.tokens += tokens

    def drafted(self, drafter: str, proposed: int, accepted: int) -> None:
        """Count the drafts of a row."""
        with self._lock:
            self.proposed[drafter] += proposed
            self.accepted[drafter] += accepted
            self.tokens += accepted

    def skipped(self, reason: str) -> None:
        """Count a call that was decoded plainly."""
        with self._lock:
            self.plain[reason] += 1

    def ties(self, count: int) -> None:
        """Count choices closer than rounding."""
        with self._lock:
            self.near_ties += count

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        with self._lock:
            return {
                "calls": self.calls,
                "steps": self.steps,
                "tokens": self.tokens,
                "tokens_per_step": round(self.tokens / self.steps, 3) if self.steps else None,
                "proposed": dict(self.proposed),
                "accepted": dict(self.accepted),
                "near_ties": self.near_ties,
                "plain_calls": dict(self.plain),
            }

    def __str__(self) -> str:
        drafted = [f"{name} {self.accepted[name]} of {count} drafts accepted" for name, count in self.proposed.items()]
        each = f"{self.tokens / self.steps:.2f} tokens per step" if self.steps else "no steps yet"
        lines = [f"{self.calls} calls, {each}" + "".join(f"; {text}" for text in drafted)]
        if self.near_ties:
            lines.append(f"{self.near_ties} choices between tokens closer than rounding")
        lines += [f"{count} x plainly: {reason}" for reason, count in self.plain.items()]
        return "\n".join(lines)
