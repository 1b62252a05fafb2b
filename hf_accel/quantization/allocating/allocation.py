"""One option for every group, so that the sum of costs is least and the sum of bytes keeps a budget.

Dynamic programming over the sums of bytes that can be had, of which only those that no other beats are kept: exact.
Where those become too many, by Lagrange multipliers (Shoham and Gersho 1988): for a price of a byte every group takes
its cheapest option by itself; the lowest price that keeps the budget is found by halving, and what it leaves over is
spent on what gains most per byte. That misses the best choice by less than what one step of one group gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_SUMS = 1 << 18  # of bytes that are kept at a time, for the exact way
_MOST_STEPS = 1 << 25  # of these, all groups together: with thousands of groups the other way loses nothing
_HALVINGS = 60


@dataclass(frozen=True)
class Option:
    """What a group of products takes and costs in so many bits.

    bits: 16 leaves it as it is; group_size: of its columns, None: a scale per row, or none; nbytes: scales and padding
    included; kl: nats per token that it is expected to cost alone.
    """

    bits: int
    group_size: int | None
    nbytes: int
    kl: float

    def __str__(self) -> str:
        return f"{self.bits}/{self.group_size}" if self.group_size else str(self.bits)


def allocate(groups: Sequence[Sequence[Option]], budget_bytes: int, most_sums: int = MOST_SUMS) -> list[int]:
    """Return the index of the option of each group by which the sum of `kl` is least within the budget.

    Raises:
        ValueError: not even the smallest options keep the budget.
    """
    least = sum(min(option.nbytes for option in options) for options in groups)
    if least > budget_bytes:
        raise ValueError(f"the options of fewest bytes take {least:,}, more than {budget_bytes:,}")
    found = _exact(groups, budget_bytes, min(most_sums, _MOST_STEPS // len(groups)))
    return _by_price(groups, budget_bytes) if found is None else found


def _exact(groups: Sequence[Sequence[Option]], budget_bytes: int, most_sums: int) -> list[int] | None:
    """Return the best choice, None where more than `most_sums` sums of bytes would be kept."""
    nbytes, kl = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # for each group: option, and place among the sums before it
    rest = sum(min(option.nbytes for option in options) for options in groups)
    for options in groups:
        rest -= min(option.nbytes for option in options)
        all_bytes = torch.cat([nbytes + option.nbytes for option in options])
        all_kl = torch.cat([kl + option.kl for option in options])
        order = torch.argsort(all_kl, stable=True)
        order = order[torch.argsort(all_bytes[order], stable=True)]
        order = order[all_bytes[order] + rest <= budget_bytes]
        best = torch.cummin(all_kl[order], 0).values
        is_better = torch.ones(len(order), dtype=torch.bool)
        is_better[1:] = best[1:] < best[:-1]
        order = order[is_better]
        if len(order) > most_sums:
            return None
        steps.append((order // len(nbytes), order % len(nbytes)))
        nbytes, kl = all_bytes[order], all_kl[order]
    chosen, place = [], len(nbytes) - 1  # of more bytes always the lesser cost
    for option, before in reversed(steps):
        chosen.append(int(option[place]))
        place = int(before[place])
    return chosen[::-1]


def _by_price(groups: Sequence[Sequence[Option]], budget_bytes: int) -> list[int]:
    def at(price: float) -> list[int]:
        return [
            min(range(len(options)), key=lambda i: (options[i].kl + price * options[i].nbytes, options[i].nbytes))
            for options in groups
        ]

    def total(chosen: list[int]) -> int:
        return sum(options[index].nbytes for options, index in zip(groups, chosen, strict=True))

    low, high = 0.0, max(option.kl for options in groups for option in options) + 1.0
    chosen = at(low)
    if total(chosen) > budget_bytes:
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5 if low else high * 1e-9
            if total(at(middle)) > budget_bytes:
                low = middle
            elif low:
                high = middle
            else:
                high, low = middle, middle * 1e-9
        chosen = at(high)
    left = budget_bytes - total(chosen)
    while True:
        moves = [
            ((options[now].kl - option.kl) / (option.nbytes - options[now].nbytes), group, index)
            for group, (options, now) in enumerate(zip(groups, chosen, strict=True))
            for index, option in enumerate(options)
            if options[now].nbytes < option.nbytes <= options[now].nbytes + left and option.kl < options[now].kl
        ]
        if not moves:
            return chosen
        _, group, index = max(moves)
        left -= groups[group][index].nbytes - groups[group][chosen[group]].nbytes
        chosen[group] = index
