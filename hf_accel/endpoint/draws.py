"""Whose turn it is to draw: the same seed gives the same text, whatever else is served.

An optimised model takes a seed. transformers' `generate` takes neither a seed nor a generator: sampling draws from
torch's generator, of which there is one per device for the whole process. So of other models a call with a seed draws
alone; calls without one draw together, and greedy calls, which draw nothing, are never waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model.support import unwrap


class Turns:
    """Many at a time, or one alone; those who want to be alone are not overtaken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = self._wanting = 0
        self._is_alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait until nobody is alone or wants to be."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_alone or self._wanting))
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else is there."""
        with self._changed:
            self._wanting += 1
            self._changed.wait_for(lambda: not (self._is_alone or self._together))
            self._wanting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()


_TURNS = Turns()  # of the process, as the generators are


@contextmanager
def drawing(model: Any, samples: bool, seed: int | None) -> Iterator[dict[str, Any]]:
    """Hold for one `generate` call what it draws from, and give the keywords that it is made with for that.

    This is the only place that knows of seeds. Where the model takes none, torch's generators are seeded for the length
    of the block, and then go on as before it.
    """
    if not samples:
        yield {}
    elif host_of(unwrap(model)) is not None:
        yield {} if seed is None else {"seed": seed}
    elif seed is None:
        with _TURNS.together():
            yield {}
    else:
        device = model.device
        with _TURNS.alone(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield {}
