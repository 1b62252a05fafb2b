"""Kernels in Triton, for GPUs; every one has a twin in pure torch in `hf_accel.ops`, of the same signature.

Triton is imported where a kernel is used: this package, and all of hf_accel, import without it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Run = TypeVar("Run", bound=Callable[..., Any])

OLDEST = (8, 0)
"""The compute capability from which these kernels were built for: bf16 products and asynchronous copies."""


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def obstacle(device: torch.device) -> str | None:
    """Return why kernels in Triton cannot run on a device, None where they can."""
    if device.type != "cuda":
        return f"kernels in Triton are for GPUs, the tensors are on {device}"
    if not _is_installed():
        return "Triton is not installed; `pip install hf-accel[gpu]` brings it"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < OLDEST:
        return f"kernels in Triton need a GPU of compute capability {OLDEST[0]}.{OLDEST[1]}, this one has {found}"
    return None


def on_its_device(run: Run) -> Run:
    """Return `run`, whose first argument is a tensor, so that it launches where that lies.

    Triton launches on the current device, which need not be the model's.
    """

    @functools.wraps(run)
    def there(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if not x.is_cuda or torch.cuda.current_device() == x.device.index:
            return run(x, *rest, **options)
        with torch.cuda.device(x.device):
            return run(x, *rest, **options)

    return there  # type: ignore[return-value]
