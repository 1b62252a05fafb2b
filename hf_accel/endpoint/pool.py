"""Who generates and who waits: a bounded number of threads, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from hf_accel.endpoint.errors import Refusal, failed
from hf_accel.endpoint.generating import Generation
from hf_accel.endpoint.limits import Limits
from hf_accel.endpoint.metrics import Metrics, Steps
from hf_accel.endpoint.outcome import Outcome

_log = logging.getLogger(__name__)


class Pool:
    """Runs generations in threads. `submit` belongs to the event loop; what a thread does it says to an `Outcome`."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.running, thread_name_prefix="hf_accel generate")
        self._lock = threading.Lock()
        self._open: set[Generation] = set()  # admitted and not over
        self._running: set[Generation] = set()  # of these
        self._usual_s = 1.0  # what a request takes, as of late
        self.is_closing = False
        metrics.follow(lambda: len(self._running), self._counted_waiting)

    def submit(self, generation: Generation, steps: Steps, streams: bool) -> Outcome:
        """Admit a generation, and return what comes of it.

        Raises:
            Refusal: the server is stopping, or too many requests wait already; when to try again is said.
        """
        with self._lock:
            if self.is_closing:
                raise Refusal("The server is being stopped.", status=503, code="shutting_down", retry_s=1)
            running, waiting = len(self._running), self._waiting()
            if running + waiting >= self._limits.running + self._limits.waiting:
                wait_s = self._usual_s * max(1, waiting) / self._limits.running
                raise Refusal(
                    f"{running} requests run and {waiting} wait; no more are taken. Try again later.",
                    status=429,
                    code="too_many_requests",
                    retry_s=min(60, math.ceil(wait_s)),
                )
            self._open.add(generation)
        outcome = Outcome(generation, streams)
        self._threads.submit(self._run, generation, steps, outcome)
        return outcome

    def _run(self, generation: Generation, steps: Steps, outcome: Outcome) -> None:
        began, error = time.perf_counter(), None
        with self._lock:
            self._running.add(generation)
        try:
            generation.run(outcome.show, steps.step)
        except Exception as caught:
            _log.exception("A generate call failed")
            error = failed(caught)
        finally:
            with self._lock:
                self._running.discard(generation)
                self._open.discard(generation)
                self._usual_s += 0.2 * (time.perf_counter() - began - self._usual_s)
        outcome.end(error)

    def _waiting(self) -> int:
        """Return how many wait for a thread; who went away does not."""
        return sum(not generation.is_cancelled for generation in self._open - self._running)

    def _counted_waiting(self) -> int:
        with self._lock:
            return self._waiting()

    async def close(self) -> None:
        """Admit no more, let those admitted finish within the limit, cancel the rest, and end the threads."""
        with self._lock:
            self.is_closing = True
        until = time.monotonic() + self._limits.drain_s
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.01)
        with self._lock:
            left = list(self._open)
        for generation in left:
            generation.cancel()
        await asyncio.to_thread(self._threads.shutdown)
