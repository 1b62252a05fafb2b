"""How often each attention kernel ran, what went down the ladder and why: a section of the report."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple


class Chosen(NamedTuple):
    """What `auto` chose for masks of a kind from a length on, and how many times as fast as stock's it was."""

    kind: str
    positions: int
    kernel: str
    gain: float


class AttentionStatistics:
    """Counts of attention calls, one per layer and pass.

    asked: the back end that the config names. refused: kernel -> what its self-test found. chosen: by trials.
    """

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.refused: dict[str, str] = {}
        self.chosen: list[Chosen] = []
        self.calls: Counter[str] = Counter()
        self.falls: Counter[tuple[str, str]] = Counter()
        self.padded_prompts = 0  # batches whose rows were read one by one
        self._lock = threading.Lock()

    def count(self, kernel: str, falls: tuple[tuple[str, str], ...] = ()) -> None:
        """Count a call that `kernel` answered, and those (kernel, reason) that it went past."""
        with self._lock:
            self.calls[kernel] += 1
            for fall in falls:
                self.falls[fall] += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "back_end": self.asked,
            "calls": dict(self.calls),
            "falls": [{"kernel": name, "reason": why, "calls": n} for (name, why), n in self.falls.items()],
            "padded_prompts": self.padded_prompts,
            "refused": dict(self.refused),
            "chosen": [each._asdict() for each in self.chosen],
        }

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {count}" for name, count in self.calls.most_common()) or "no calls yet"]
        if self.padded_prompts:
            lines.append(f"{self.padded_prompts} padded prompts read row by row")
        lines += [f"{each.kernel} for {each.kind} from {each.positions} ({each.gain:.2f} x)" for each in self.chosen]
        lines += [f"{count} calls past {name}: {why}" for (name, why), count in self.falls.items()]
        lines += [f"{name} refused: {found}" for name, found in self.refused.items()]
        return "\n".join(lines)
