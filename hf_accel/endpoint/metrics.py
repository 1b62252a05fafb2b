"""What an endpoint counts, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counts of one application, in a registry of its own; every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "hf_accel_requests", "Requests that were answered, by status.", ["path", "status"], registry=registry
        )
        self._prompt = Counter("hf_accel_prompt_tokens", "Tokens of prompts that were read.", registry=registry)
        self._generated = Counter("hf_accel_generated_tokens", "Tokens that were written.", registry=registry)
        self._first = Histogram(
            "hf_accel_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_FIRST_S,
            registry=registry,
        )
        self._between = Histogram(
            "hf_accel_time_between_tokens_seconds",
            "From one step of a request to its next.",
            buckets=_BETWEEN_S,
            registry=registry,
        )
        self._running = Gauge("hf_accel_running_requests", "Requests that are generating.", registry=registry)
        self._waiting = Gauge("hf_accel_waiting_requests", "Requests that wait for a thread.", registry=registry)

    def follow(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Ask whoever knows how many run and wait, whenever somebody looks."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def answered(self, path: str, status: int) -> None:
        """Count a request; status 499 stands for one whose client went away."""
        self._requests.labels(path, str(status)).inc()

    def watch(self, prompt_tokens: int, arrived: float) -> Steps:
        """Return what counts the steps of one request, which arrived at this time of `time.perf_counter`."""
        return Steps(self._prompt, self._generated, self._first, self._between, prompt_tokens, arrived)

    def page(self) -> bytes:
        """Return all counts as text."""
        return generate_latest(self._registry)


class Steps:
    """The clock of one request; used by one thread."""

    def __init__(
        self,
        prompt: Counter,
        generated: Counter,
        first: Histogram,
        between: Histogram,
        prompt_tokens: int,
        arrived: float,
    ) -> None:
        self._prompt, self._generated, self._first, self._between = prompt, generated, first, between
        self._prompt_tokens, self._last, self._is_first = prompt_tokens, arrived, True

    def step(self, tokens: int) -> None:
        """Count a step that wrote so many tokens."""
        now = time.perf_counter()
        (self._first if self._is_first else self._between).observe(now - self._last)
        if self._is_first:
            self._prompt.inc(self._prompt_tokens)
        self._last, self._is_first = now, False
        self._generated.inc(tokens)
