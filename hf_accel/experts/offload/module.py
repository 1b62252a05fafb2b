"""The forward of a module whose experts lie in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_accel.core.journal import beneath
from hf_accel.experts.offload.guard import Guard
from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.stored import StoredExperts


class Offloaded:
    """Marks modules whose `forward` is an `offloaded_forward`; all else is as the class it is mixed over does.

    `slots` is of the class that is made for a module. Copies, pickles and saved files take the weights out of the
    mapped file, once it is known to be whole.
    """

    slots: Slots

    def __getstate__(self) -> Any:
        self.slots.file.check()
        return beneath(Offloaded, self, "__getstate__")()

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        self.slots.file.check()
        beneath(Offloaded, self, "_save_to_state_dict")(*args, **options)


def offloaded_forward(stored: StoredExperts, guard: Guard, slots: Slots) -> Callable[..., Tensor]:
    """Return the `forward` of a module whose experts are `stored`, as long as `guard` holds.

    All is bound here and not read from the module, whose class another thread may put back while this runs.
    """

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not _fits(stored, hidden_states, top_k_index, top_k_weights) or not guard.holds(self):
            slots.file.check()
            stored.handed_on += 1
            return beneath(Offloaded, self, "forward")(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        return computed(stored, slots, hidden_states, top_k_index, top_k_weights)

    return forward


def _fits(stored: StoredExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and hidden.dtype is stored.dtype
        and hidden.is_cpu
        and hidden.dim() == 2
        and ids.dim() == 2
        and ids.dtype is torch.int64
        and weights.shape == ids.shape
        and weights.dtype in (stored.dtype, torch.float32)
    )


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
