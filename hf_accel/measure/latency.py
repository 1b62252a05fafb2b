"""Seconds of prefill and per token of a `generate` call, and alternation of several ways of running one.

Machines are noisy: ways are compared A B A B in one run, and the ratio of medians is quoted with the spread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

# a model's own generation_config may ask for what cannot be timed token by token, or compared
PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "use_cache": True,
    "cache_implementation": None,
    "prompt_lookup_num_tokens": None,
    "stop_strings": None,
    "max_time": None,
}


@dataclass(frozen=True)
class Run:
    """One `generate` call: the time to the first token, the time of each further one, and the ids [B, S].

    tokens_cpu_s: what each further token took of the time of all processors, as far as this process used it.
    """

    prefill_s: float
    tokens_s: list[float]
    ids: torch.Tensor
    tokens_cpu_s: list[float] = field(default_factory=list)

    @property
    def token_s(self) -> float:
        """Mean seconds per token after the first; a median would hide the time other programs take from long tokens."""
        return statistics.mean(self.tokens_s)


@dataclass
class Timing:
    """Repeated measurements of one quantity, in seconds."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles (of few values: between the extremes) over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class _Clock(BaseStreamer):
    """Notes when each token arrives. The first `put` is the prompt."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def put(self, value: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())

    def end(self) -> None:
        """All tokens have arrived."""


def timed_generate(model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int, **arguments: Any) -> Run:
    """Generate exactly `new_tokens` tokens (at least 2) and return their times. Greedy unless told otherwise."""
    clock = _Clock(model.device)
    options = PLAIN | {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    start = time.perf_counter()
    ids = model.generate(**inputs, **(options | arguments), streamer=clock)  # type: ignore[operator]
    arrivals = clock.times[1:]
    return Run(arrivals[0] - start, _steps(arrivals), ids, _steps(clock.cpu_times[1:]))


def _steps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def alternate(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    each: Callable[[], None] | None = None,
    budget_s: float = math.inf,
) -> dict[str, list[Any]]:
    """Call every way once per round, in alternating order, and return what each returned.

    `each` is called after every call. No further round begins once `budget_s` is spent, but two are always made.
    """
    results: dict[str, list[Any]] = {name: [] for name in ways}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - start > budget_s:
            break
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(ways[name]())
            if each is not None:
                each()
    return results
