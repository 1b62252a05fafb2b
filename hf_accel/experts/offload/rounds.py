"""A call of stored experts: in one round, or in several where it wants more experts than slots hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.stored import StoredExperts


def computed(stored: StoredExperts, slots: Slots, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return [T, E] for hidden [T, E], ids and weights [T, k], reading what is not in memory.

    Where the call wants more experts than slots hold, some are read, computed with and given up for others, in the
    order of their ids: with the same bits as a single call.

    Raises:
        StorageError: experts cannot be read.
    """
    count = stored.form.experts
    rows = _rows(ids, count)
    experts = rows.nonzero()[0]
    rounds = list(_rounds(slots.sizes[stored.first + experts], slots.budget))
    if len(rounds) < 2:
        kept = slots.acquire(stored, experts, rows[experts])
        try:
            return stored.kernel(hidden, ids, weights)
        finally:
            slots.release(kept)
    sums = torch.zeros(hidden.shape, dtype=torch.float32)
    for first, end in rounds:
        some = experts[first:end]
        kept = slots.acquire(stored, some, rows[some])
        try:
            of_round = (ids >= int(some[0])) & (ids <= int(some[-1]))
            output = stored.kernel(hidden, torch.where(of_round, ids, count), weights, sums=sums)
        finally:
            slots.release(kept)
    return output


def _rows(ids: Tensor, count: int) -> np.ndarray:
    """Return how many rows each of `count` experts is sent, int64 [count]; ids out of range stand for none."""
    flat = ids.detach().numpy().reshape(-1)
    if len(flat) and flat.min() < 0:
        flat = flat[flat >= 0]
    return np.bincount(flat, minlength=count)[:count]


def _rounds(sizes: np.ndarray, budget: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of experts, given by their bytes, that fit the budget."""
    if int(sizes.sum()) <= budget:
        yield 0, len(sizes)
        return
    first, total = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if total + size > budget:
            yield first, place
            first, total = place, 0
        total += size
    yield first, len(sizes)
