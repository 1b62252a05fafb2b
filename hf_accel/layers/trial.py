"""Up to how many rows a decoder layer is faster natively than by its own forward: a short trial per shape of layer.

Of few rows it always is. Of many, ATen's products read weights as well as ours do, and the arithmetic decides: it is
our kernels against oneDNN's and MKL's on this machine, with what is around them in a layer of this size. Cost: at most
about three seconds per shape of layer, and half of that to look at what decides once more, once per process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.kernels import native
from hf_accel.layers.audit import RecordedLayer, Replacement

SIZES = (32, 64, 128, 256, 512)
ROUNDS = 3
LONG_S = 0.1  # a round that takes longer is the only one: what disturbs for a millisecond does not show in it
BUDGET_S = 3.0
BATCHES = (1, 4)  # how many prompts the rows belong to: of many short ones the attention is less
MARGIN = 0.98  # of the time of the layer's own forward: a gain of less is not worth the mistake
_known: dict[Any, int] = {}


@dataclass(frozen=True)
class Extent:
    """Which calls of a layer run natively: of up to `few` rows all, of up to `many` rows those that were tried.

    A trial of one prompt has as many columns as rows, so that its attention takes rows x columns operations.
    """

    few: int
    many: int

    def covers(self, rows: int, columns: int) -> bool:
        """Return whether a call with so many rows (batch x tokens) that see up to so many columns is one of them."""
        return rows <= self.few or (rows <= self.many and rows * columns <= self.many * self.many)


def _cost(pair: float) -> float:
    """Return how long a size takes whose call takes so many seconds both ways together."""
    return (ROUNDS if pair < LONG_S else 1) * len(BATCHES) * pair


def rows_that_pay(few: int, seconds: Callable[[int], tuple[float, float]]) -> int:
    """Return up to how many rows a layer runs faster natively, at least `few`.

    seconds: returns, for a number of rows, the least times of the layer's own forward and of the native call, for those
        of BATCHES where the native call gains least.
    Sizes are tried in rising order, each twice the last, until BUDGET_S is spent or up to the first loss; then the one
    halfway before it, too. A loss has to show twice, and so has the gain that decides: what disturbs the layer's own
    forward makes one.
    """
    gained, spent = [few], 0.0
    for rows in SIZES:
        if rows <= few:
            continue
        pays, took = _pays(rows, seconds)
        spent += _cost(took)
        if not pays:
            between = rows * 3 // 4
            if between > gained[-1] and _pays(between, seconds)[0]:
                gained.append(between)
            break
        gained.append(rows)
        if spent + _cost(2 * took) > BUDGET_S:
            break
    while gained[-1] > few and not _pays(gained[-1], seconds)[0]:
        gained.pop()
    return gained[-1]


def _pays(rows: int, seconds: Callable[[int], tuple[float, float]]) -> tuple[bool, float]:
    """Return whether so many rows are faster natively, and the seconds of a call both ways."""
    own, ours = seconds(rows)
    if ours > MARGIN * own:  # other programs only ever add time: a loss has to show twice
        own, ours = map(min, (own, ours), seconds(rows))
    return ours <= MARGIN * own, own + ours


def tried_rows(few: int, key: Any, pairs: Sequence[tuple[Callable[[], RecordedLayer], Replacement]]) -> int:
    """Return `rows_that_pay` for layers of one shape, remembered under `key`.

    pairs: what returns the record of a layer of the shape, and its native call. Layers take turns, so that weights
        come from where they do in a model.
    """
    key = (few, key, native.status().isa, torch.get_num_threads())
    if key not in _known:
        _known[key] = rows_that_pay(few, lambda rows: _seconds(rows, pairs))
    return _known[key]


@torch.no_grad()
def _seconds(rows: int, pairs: Sequence[tuple[Callable[[], RecordedLayer], Replacement]]) -> tuple[float, float]:
    found = []
    for batch in BATCHES:
        own = ours = float("inf")
        for turn in range(ROUNDS):
            record, replacement = pairs[turn % len(pairs)]
            recorded = record()
            hidden, kwargs = recorded.prompts(batch, rows // batch)
            cache = {recorded.block.form.call.cache: DynamicCache()}
            start = time.perf_counter()
            recorded.layer(hidden, **kwargs, **cache)
            middle = time.perf_counter()
            served = recorded.replaced(replacement, hidden, kwargs) is not None
            stop = time.perf_counter()
            if not served:
                return 0.0, float("inf")
            own, ours = min(own, middle - start), min(ours, stop - middle)
            if own + ours > LONG_S:
                break
        found.append((own, ours))
    return max(found, key=lambda times: times[1] / times[0])
