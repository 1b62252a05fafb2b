"""How many threads read fastest here, and whether memory is better spread over the nodes: a trial of some seconds.

Nothing stays: the number of torch's threads is afterwards what it was. Who wants what the trial shows says
`torch.set_num_threads(thread_trial().best)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.measure.topology import Topology

_BYTES, _ROUNDS = 256 << 20, 3
_COLUMNS = 4096
_WORTH = 1.05  # what more threads, or fewer, have to gain to be worth a word


@dataclass(frozen=True)
class ThreadTrial:
    """Bytes per second by number of threads: plain reads, and products of one row as decoding makes them.

    spread: how much faster memory is read that all threads have written first than memory of one node; None: one node.
    """

    threads: int
    reads: dict[int, float]
    products: dict[int, float]
    spread: float | None = None

    @property
    def best(self) -> int:
        """The number of threads to use: the fewest within 5 % of the fastest, or what is in use where that is so."""
        most = max(self.products.values())
        enough = [count for count, rate in sorted(self.products.items()) if rate * _WORTH >= most]
        return self.threads if self.threads in enough else enough[0]

    @property
    def gain(self) -> float:
        """What the best number of threads gains over the one in use."""
        return self.products[self.best] / self.products[self.threads]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best, "gain": self.gain}


def thread_trial(topology: Topology | None = None) -> ThreadTrial:
    """Try one thread, one per core, one per processor, as many as are granted, and as many as torch uses now.

    Cost: 256 MiB, three rounds of reads and products; several nodes: 512 MiB.

    Raises:
        RuntimeError: there is no memory for the trial.
    """
    topology = Topology.here() if topology is None else topology
    before = torch.get_num_threads()
    granted = topology.logical if topology.quota is None else max(1, math.floor(topology.quota))
    counts = sorted({1, topology.physical, topology.logical, min(granted, topology.logical), before})
    weight = torch.full((_BYTES // 2 // _COLUMNS, _COLUMNS), 0.01, dtype=torch.bfloat16)
    x = torch.ones(1, _COLUMNS, dtype=torch.bfloat16)
    try:
        products = _rates(counts, lambda: _product(x, weight))
        reads = _rates(counts, lambda: _read(weight))
        spread = _spread(weight, topology.logical) if len(topology.nodes) > 1 else None
    finally:
        torch.set_num_threads(before)
    return ThreadTrial(before, reads, products, spread)


def _rates(counts: Iterable[int], work: Callable[[], Any]) -> dict[int, float]:
    """Return the best rate of each number of threads, tried in turn."""
    best = dict.fromkeys(counts, 0.0)
    for _ in range(_ROUNDS):
        for count in best:
            torch.set_num_threads(count)
            work()  # the pool has this number of threads from here on
            begin = time.perf_counter()
            work()
            best[count] = max(best[count], _BYTES / (time.perf_counter() - begin))
    return best


def _spread(like: Tensor, threads: int) -> float:
    """Return how much faster all threads read what all of them wrote first than what one of them did."""
    buffers = []
    for writers in (1, threads):
        torch.set_num_threads(writers)
        buffers.append(torch.empty_like(like).fill_(0.01))
    one, all_ = (_rates([threads], lambda buffer=buffer: _read(buffer))[threads] for buffer in buffers)  # type: ignore[misc]
    return all_ / one


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return native.linear(x, weight) if native.is_available() else torch.nn.functional.linear(x, weight)


def _read(buffer: Tensor) -> Any:
    return native.stream(buffer) if native.is_available() else torch.sum(buffer).item()
