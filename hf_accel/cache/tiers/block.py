"""A block of a cache that is kept in tiers: keys and values of some positions of a layer, wherever they lie."""

from __future__ import annotations

import torch

from hf_accel.cache.tiers.layout import Layout, Run, runs_of
from hf_accel.cache.tiers.spill import Extent


class Block:
    """Keys and values of some positions: tensors in memory or an extent of the file, and which rows of them count."""

    __slots__ = ("extent", "keys", "layout", "rows", "runs", "shown", "tier", "values")

    def __init__(self, layout: Layout) -> None:
        self.layout = self.shown = layout  # as stored and as read
        self.tier = ""
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.extent: Extent | None = None
        self.rows: tuple[int, ...] | None = None  # None: all, in order
        self.runs: list[Run] = [Run(0, 0, layout.rows)]

    def show(self, rows: tuple[int, ...] | None) -> None:
        """Let row b of the block be the stored row rows[b]."""
        self.rows = rows
        self.shown = self.layout if rows is None else self.layout.of_rows(len(rows))
        self.runs = [Run(0, 0, self.layout.rows)] if rows is None else runs_of(rows)
