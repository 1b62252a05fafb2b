"""How long steps take. A device that runs behind the host is asked for its own times, and nobody waits for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Measures what runs on a device, in seconds; by one thread at a time, the one whose turn it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    def now(self) -> Any:
        """Return this moment: on CUDA devices the one when all that is queued has been done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def tell(self, begin: Any, end: Any, told: Callable[[float], None]) -> None:
        """Let `told` have the seconds between two moments: now, or when later ones are told and both have been."""
        if self._device.type != "cuda":
            told(end - begin)
            return
        self._open.append((begin, end, told))
        while self._open and self._open[0][1].query():
            begin, end, told = self._open.popleft()
            told(begin.elapsed_time(end) / 1e3)
