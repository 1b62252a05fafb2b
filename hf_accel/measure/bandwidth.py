"""The rate at which this machine reads memory: the floor of decoding is weight bytes over this rate."""

from __future__ import annotations

import functools
import time

import torch

from hf_accel.kernels import native

_BYTES = 256 << 20  # more than the caches of one machine's share; some hundredths of a second per pass
_DEVICE_BYTES = 2 << 30  # many times the cache of a GPU, and long beside a launch


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Return bytes per second read by all of torch's threads (CPU) or the device, the best of several passes.

    Cost: 256 MiB (on a CUDA device 2 GiB, or a quarter of what is free) for the duration of the measurement, which is
    made once per process, device and number of threads.
    """
    return _measured(str(device), torch.get_num_threads())


@functools.cache
def _measured(device: str, threads: int) -> float:
    if torch.device(device).type == "cuda":
        return _of_cuda(device)
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


def _of_cuda(device: str) -> float:
    """Return what a reduction reads, or a copy reads and writes, whichever is more, by the device's own clock."""
    free, _ = torch.cuda.mem_get_info(device)
    count = min(_DEVICE_BYTES, free // 4) // 8
    buffer = torch.ones(count, dtype=torch.float32, device=device)
    other = torch.empty_like(buffer)
    size, best = buffer.nbytes, 0.0
    for moved, work in ((size, lambda: torch.sum(buffer)), (2 * size, lambda: other.copy_(buffer))):
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            best = max(best, moved / (start.elapsed_time(end) * 1e-3))
    return best
