"""Kernels in Triton, for GPUs; every one has a twin in pure torch in `hf_accel.ops`, of the same signature.

Triton is imported where a kernel is used: this package, and all of hf_accel, import without it.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

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
