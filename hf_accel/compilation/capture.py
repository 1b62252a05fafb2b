"""Captures a step and replays it: on CUDA devices as a graph, one launch for all kernels of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from hf_accel.core.calls.seeding import DRAWS

T = TypeVar("T")

WARM_UPS = 2  # before a capture: libraries choose and compile their kernels in the first runs


class Capture(Protocol):
    """Captures what functions do on the device. one_call: whether replays serve one call at a time, others none."""

    one_call: bool

    def capture(self, warm_up: Callable[[], Any], run: Callable[[], T]) -> Callable[[], T]:
        """Capture `run` and return what replays it and returns its results, which are valid until the next replay.

        warm_up: does what `run` does, and may be run any number of times before.

        Raises:
            RuntimeError: it cannot be captured, or memory is short; nothing but `warm_up` has been run then.
        """
        ...


class CudaGraphs:
    """CUDA graphs with a memory pool of their own, which the graphs of one model share: only one may run at a time."""

    one_call = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, warm_up: Callable[[], Any], run: Callable[[], T]) -> Callable[[], T]:
        """See `Capture`."""
        current, side = torch.cuda.current_stream(self.device), self._stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                warm_up()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        with DRAWS, torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            results = run()

        def replay() -> T:
            graph.replay()
            return results

        return replay


class Direct:
    """Runs what it is given, for devices on which compiled steps cost few launches, or none."""

    one_call = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, warm_up: Callable[[], Any], run: Callable[[], T]) -> Callable[[], T]:
        """See `Capture`."""
        warm_up()
        return run


def capture_for(device: torch.device) -> Capture:
    """Return what captures on `device`; where nothing does, what runs steps as they are."""
    return CAPTURES.get(device.type, Direct)(device)


def graph_obstacle(device: torch.device) -> str | None:
    """Return why nothing can be captured on `device`, None if it can."""
    if device.type not in CAPTURES:
        return f"the model is on {device.type}; graphs are for CUDA devices."
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < MINIMUM_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {major}.{minor}; graphs are used from {MINIMUM_CAPABILITY}.0 on."
    return None


MINIMUM_CAPABILITY = 7
CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaGraphs}
"""What captures on a type of device."""
