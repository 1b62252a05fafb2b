"""Where tokens were sent: rows per expert of every layer, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

MOST = 0.9  # of the routing: how many experts carry it


class LayerRouting(NamedTuple):
    """Rows that the experts of one layer were sent, sums over all calls of `generate`.

    rows: in all; experts: of the layer; dead: without a row; hottest: the largest share of the rows;
    carrying: the share of the experts that carries 90 % of the rows; balance: the mean over the largest, 1 if even.
    """

    rows: int
    experts: int
    dead: int
    hottest: float
    carrying: float
    balance: float

    @staticmethod
    def of(counts: torch.Tensor) -> LayerRouting:
        """Summarise counts, int64 [experts]."""
        total, experts = int(counts.sum()), counts.numel()
        if not total:
            return LayerRouting(0, experts, experts, 0.0, 0.0, 0.0)
        shares = counts.sort(descending=True).values.double() / total
        carrying = int((shares.cumsum(0) < MOST - 1e-12).sum()) + 1
        dead = int((counts == 0).sum())
        return LayerRouting(
            total, experts, dead, float(shares[0]), carrying / experts, 1 / (experts * float(shares[0]))
        )


class ExpertsStatistics:
    """The section of the report: counts are read when it is asked for.

    counts: path of a module of experts -> rows by expert, int64 [experts]; expert_bytes: path -> bytes of one expert;
    choices: experts of a token.
    """

    def __init__(
        self, counts: Mapping[str, torch.Tensor], expert_bytes: Mapping[str, int], choices: int | None
    ) -> None:
        self._counts, self._expert_bytes, self._choices = counts, expert_bytes, choices

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of routed experts that a token of a batch of one reads; None where the model does not say how many."""
        return None if self._choices is None else self._choices * sum(self._expert_bytes.values())

    def layers(self) -> dict[str, LayerRouting]:
        """Return path -> where its rows went."""
        return {path: LayerRouting.of(counts.clone()) for path, counts in self._counts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return counts and their summaries as JSON values."""
        return {
            "bytes_per_token": self.bytes_per_token,
            "layers": {
                path: layer._asdict() | {"counts": self._counts[path].tolist()} for path, layer in self.layers().items()
            },
        }

    def __str__(self) -> str:
        layers = [layer for layer in self.layers().values() if layer.rows]
        size = "" if self.bytes_per_token is None else f"{self.bytes_per_token / 1e6:.1f} MB of experts per token; "
        if not layers:
            return f"{size}no tokens were routed yet"
        rows, count = sum(layer.rows for layer in layers), len(layers)
        dead = sum(layer.dead for layer in layers)
        carrying = sum(layer.carrying for layer in layers) / count
        return (
            f"{size}{rows} rows routed in {count} layers; 90 % of them to {carrying:.0%} of the experts; the "
            f"hottest takes up to {max(x.hottest for x in layers):.1%}; {dead} of "
            f"{sum(layer.experts for layer in layers)} experts had none"
        )
