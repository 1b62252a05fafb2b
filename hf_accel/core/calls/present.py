"""Which rows of a batch still take part in its passes. Rows that have ended leave: the model sees a smaller batch.

A row that leaves is replaced by the last one that stays, so that one row is moved and not the batch; rows of the cache
are then in another order than those of the call, which `Present` knows. Everything around the passes has all rows as
before: what it is given of a row that left is that of another one, and nobody looks at it. Cost: a copy of each row
that is moved (of all that stay, in layers of transformers'), one layer after the other.
"""

from __future__ import annotations

from collections.abc import Collection

import torch


class Present:
    """The rows of a batch that are in the cache.

    order: for each row of the cache, which row of the call it is. saved: rows that passes have been spared so far.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch, self.order = batch, list(range(batch))
        self.saved = 0
        self._device = device
        self._index = self._places = torch.arange(0)

    @property
    def is_whole(self) -> bool:
        """Whether no row has left, so that rows are those of the call."""
        return len(self.order) == self.batch

    def slots_without(self, ended: Collection[int]) -> list[int]:
        """Return which row of the cache each of those has to be that stay when these rows of the call leave."""
        stay = [slot for slot, row in enumerate(self.order) if row not in ended]
        count = len(stay)
        movers = iter([slot for slot in stay if slot >= count])
        kept = set(stay)
        return [slot if slot in kept else next(movers) for slot in range(count)]

    def leave(self, slots: list[int]) -> None:
        """Note that row b of the cache is what row slots[b] was."""
        self.order = [self.order[slot] for slot in slots]
        places = [0] * self.batch  # of a row that has left: that of some other
        for place, row in enumerate(self.order):
            places[row] = place
        self._index = torch.tensor(self.order, device=self._device)
        self._places = torch.tensor(places, device=self._device)

    def taken(self, tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """Return of a tensor that has the rows of the call along an axis those of the cache."""
        return tensor if self.is_whole else tensor.index_select(axis, self._index.to(tensor.device))

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor [rows of the cache, ...] with all rows of the call; those that left have what another has."""
        return tensor if self.is_whole else tensor.index_select(0, self._places.to(tensor.device))

    def count_pass(self) -> None:
        """Count what a pass was spared."""
        self.saved += self.batch - len(self.order)
