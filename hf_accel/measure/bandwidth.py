"""The rate at which this machine reads memory: the floor of decoding is weight bytes over this rate."""

from __future__ import annotations

import functools
import time

import torch

from hf_accel.kernels import native

_BYTES = 256 << 20  # more than the caches of one machine's share; some hundredths of a second per pass


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Return bytes per second read by all of torch's threads (CPU) or the device, the best of several passes.

    Cost: 256 MiB for the duration of the measurement, which is made once per process, device and number of threads.
    """
    return _measured(str(device), torch.get_num_threads())


@functools.cache
def _measured(device: str, threads: int) -> float:
    buffer = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        if buffer.is_cpu and native.is_available():
            native.stream(buffer)
        else:
            torch.sum(buffer).item()
        best = max(best, _BYTES / (time.perf_counter() - start))
    return best
