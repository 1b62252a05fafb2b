"""How often the experts that calls wanted were in memory, and how much of the routing how many experts carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.stored import StoredExperts

MOST = 0.9  # of the routing


class OffloadStatistics:
    """The section of the report; everything is read when it is asked for."""

    def __init__(self, slots: Slots, stored: Sequence[StoredExperts]) -> None:
        self._slots, self._stored = slots, stored

    @property
    def hit_rate(self) -> float | None:
        """The share of experts that calls found in memory, an expert counted once per call; None before any call."""
        wanted = self._slots.hits + self._slots.misses
        return self._slots.hits / wanted if wanted else None

    @property
    def concentration(self) -> float | None:
        """The least share of all experts, by their bytes, that 90 % of the routed rows were sent to."""
        return concentration(torch.cat([each.kernel.counts for each in self._stored]), self._slots.sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        slots = self._slots
        return {
            "budget_bytes": slots.budget,
            "experts_bytes": int(slots.sizes.sum()),
            "held_bytes": slots.held_bytes,
            "hits": slots.hits,
            "misses": slots.misses,
            "hit_rate": self.hit_rate,
            "read_bytes": slots.read_bytes,
            "read_seconds": round(slots.read_seconds, 6),
            "concentration": self.concentration,
            "handed_on": sum(each.handed_on for each in self._stored),
            "folder": slots.file.folder,
        }

    def __str__(self) -> str:
        slots, total = self._slots, int(self._slots.sizes.sum())
        lines = [f"{slots.held_bytes / 1e6:.1f} MB held, budget {slots.budget / 1e6:.1f} of {total / 1e6:.1f} MB"]
        if self.hit_rate is not None:
            rate = f" at {slots.read_bytes / slots.read_seconds / 1e9:.1f} GB/s" if slots.read_seconds else ""
            lines.append(
                f"{slots.hits} hits, {slots.misses} misses ({self.hit_rate:.1%} in memory); "
                f"{slots.read_bytes / 1e6:.1f} MB read{rate}"
            )
        if self.concentration is not None:
            lines.append(said(self.concentration, slots.budget / total))
        if handed_on := sum(each.handed_on for each in self._stored):
            lines.append(f"{handed_on} calls of experts went to the model's own code")
        if (lost := slots.file.lost_from()) is not None:
            lines.append(f"the file in {slots.file.folder} is lost from byte {lost:,} on: load the model anew")
        return "\n".join(lines)


def concentration(rows: torch.Tensor, sizes: Any) -> float | None:
    """Return the least share of the bytes `sizes` of experts that `MOST` of the rows were sent to; None for no rows."""
    total = int(rows.sum())
    if not total:
        return None
    order = rows.argsort(descending=True)
    carried = rows[order].double().cumsum(0) / total
    needed = int((carried < MOST - 1e-12).sum()) + 1
    bytes_of = torch.as_tensor(sizes)
    return float(bytes_of[order[:needed]].sum() / bytes_of.sum())


def said(share: float, budget: float) -> str:
    """Return what a concentration means for a budget, both as shares of all experts' bytes."""
    verdict = "the budget is under that and costs" if budget < share else "a budget under that would cost"
    return f"{MOST:.0%} of the routing needs {share:.0%} of the experts: {verdict} time"
