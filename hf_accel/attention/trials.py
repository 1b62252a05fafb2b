"""Which kernel is the fastest here: the kernels that passed their self-test against stock's attention, in alternation.

At a few lengths, on random states of the model's head sizes, dtype and grouping. The least time of a kernel counts, for
other programs only ever add to it; a kernel has to be shown faster than stock's to be chosen. Cost: at most BUDGET_S
for a kind of mask, once per process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_accel.attention.cases import Case, Shape, case
from hf_accel.attention.registry import KERNELS
from hf_accel.attention.statistics import Chosen
from hf_accel.attention.stock import mask_of
from hf_accel.ops.attention import grouped_attention

LENGTHS = (32, 128, 512, 2048)
BUDGET_S = 0.3  # of one length: a longer one is left out that would take more
ROUNDS = 3
FEW, PAST = 8, 504  # queries of a step of several tokens, and what came before
GAIN = 1.03  # less cannot be told from noise
STOCK = "stock"
Stock = Callable[[Case], object]


class Kind(NamedTuple):
    """A kind of mask that is timed: "causal", "padded" or "boolean", and what else the scores are subject to."""

    mask: str
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        words = [self.mask, *([] if self.window is None else [f"window {self.window}"])]
        return " ".join([*words, *(["soft cap"] if self.softcap else []), *(["sinks"] if self.has_sinks else [])])

    def call(self, shape: Shape, tokens: int, groups: int) -> Case:
        """Return a call of T tokens over as many columns; of a padded batch half of one row in two is padding."""
        return case(
            str(self), shape, tokens, starts=(0, tokens // 2) if self.mask == "padded" else (0,), window=self.window,
            softcap=self.softcap, sinks=self.has_sinks, mask=torch.bool if self.mask == "boolean" else None,
            groups=groups,
        )  # fmt: skip


@functools.lru_cache(256)
def chosen(
    kind: Kind, shape: Shape, groups: int, candidates: tuple[str, ...], stock: Stock, longest: int, threads: int
) -> tuple[Chosen, ...]:
    """Return the fastest of the candidates and stock's for each length, up to `longest`, that fits the budget.

    groups: key/value heads that the states have. threads: as torch has them, since what is fastest depends on it.
    """
    found: list[Chosen] = []
    spent, before = 0.0, 0
    for tokens in (length for length in LENGTHS if length <= longest or length == LENGTHS[0]):
        call = kind.call(shape, tokens, groups)
        ways: dict[str, Callable[[], object]] = {STOCK: functools.partial(stock, call)}
        for name in candidates:
            if KERNELS[name].obstacle(call.question) is None:
                ways[name] = functools.partial(call.found, KERNELS[name])
        if before and spent * (tokens / before) ** 2 > BUDGET_S:
            break
        start = time.perf_counter()
        least = _least_times(ways, shape.device)
        spent, before = time.perf_counter() - start, tokens
        best = min((name for name in least if name != STOCK), key=least.__getitem__, default=STOCK)
        gain = least[STOCK] / least[best]
        found.append(Chosen(str(kind), tokens, best, gain) if gain > GAIN else Chosen(str(kind), tokens, STOCK, 1.0))
    return tuple(found)


@functools.lru_cache(256)
def grouped_gain(shape: Shape, groups: int, stock: Stock, threads: int) -> float:
    """Return how many times as fast as stock's a step of a few queries is that reads grouped keys and values as they
    are; arguments as of `chosen`."""
    call = case("past", shape, FEW, past=PAST, starts=(0, PAST // 4), groups=groups)
    mask = mask_of(call.visible)
    ways: dict[str, Callable[[], object]] = {
        STOCK: functools.partial(stock, call),
        "grouped": functools.partial(grouped_attention, call.query, call.key, call.value, mask),
    }
    least = _least_times(ways, shape.device)
    return least[STOCK] / least["grouped"]


@torch.no_grad()
def _least_times(ways: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the least seconds of each way; every first call only warms up."""
    least = dict.fromkeys(ways, float("inf"))
    for number in range(ROUNDS + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            _wait(device)
            start = time.perf_counter()
            ways[name]()
            _wait(device)
            if number:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
