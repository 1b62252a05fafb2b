"""How strongly each channel of what products read is, in parts of a text: by that it is seen whether texts are alike.

Memory: `PARTS` K numbers in fp32 for every input of K channels. Time: none, as they are the diagonals of moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_accel.quantization.observing import Moment

PARTS = 8  # of the text, at most: what they differ by among themselves is what parts of one text differ by
_FLOOR = 1e-6  # of the mean over channels: a channel that is never used tells nothing


def ends_of(rows: int) -> list[int]:
    """Return after which rows the parts of a text of so many rows end; those of a part are equally many, or one more.

    One row has no parts.
    """
    parts = min(PARTS, rows)
    return [] if parts < 2 else [(part + 1) * rows // parts for part in range(parts)]


@dataclass
class Powers:
    """Mean squares of the inputs of products while a text is read row by row; `rows` of it there are."""

    rows: int
    _sums: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)

    def end_row(self, row: int, moments: Mapping[str, Moment]) -> None:
        """Say that row number `row` has been added to the moments of products, by path."""
        if row + 1 not in ends_of(self.rows):
            return
        seen: set[int] = set()
        for path, moment in moments.items():
            if id(moment) not in seen:  # of products that read one tensor the first
                seen.add(id(moment))
                self._sums.setdefault(path, []).append((moment.total.diagonal().clone(), moment.count))

    def found(self, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return path -> mean squares fp32 [parts, K] of what was read in every part.

        scales: path -> by what channels [K] are divided from now on.
        """
        found = {}
        for path, sums in self._sums.items():
            totals = torch.stack([total for total, _ in sums]).diff(dim=0, prepend=torch.zeros_like(sums[0][0])[None])
            counts = torch.tensor([count for _, count in sums]).diff(prepend=torch.tensor([0])).to(totals.device)
            if len(sums) == len(ends_of(self.rows)) and bool((counts > 0).all()):
                means = totals / counts[:, None]
                found[path] = (means / scales[path].double().square() if path in scales else means).float()
        return found


def distance(one: Tensor, two: Tensor) -> float:
    """Return how far two inputs with mean squares [K] are apart: the mean over channels of the symmetric
    Kullback-Leibler divergence, in nats, of normal distributions around zero with these variances."""
    one, two = one.double(), two.double()
    least = _FLOOR * (one.mean() + two.mean()) + torch.finfo(torch.float64).tiny
    ratio = (one + least) / (two + least)
    return float((ratio + 1 / ratio - 2).mean() / 4)


def distances_within(parts: Tensor) -> list[float]:
    """Return how far each part of mean squares [parts, K] is from the mean of the others."""
    total = parts.double().sum(dim=0)
    return [distance((total - part.double()) / (len(parts) - 1), part) for part in parts]
