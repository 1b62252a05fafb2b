"""Whether an attention kernel is right on this device: every kind of mask that it claims, against float64.

A kernel is not used before it has passed, for the device, dtype, head sizes and grouping that it is to be used with;
each is tested once per process. What counts is the worst query: the relative difference of its output over all heads.
"""

from __future__ import annotations

import functools

import torch

from hf_accel.attention.cases import Case, Shape, cases
from hf_accel.attention.registry import KERNELS
from hf_accel.errors import described
from hf_accel.ops import tolerances


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative difference that a query has over all its heads; infinite where one is no number."""
    wrong = (found.detach().cpu().double() - expected).flatten(2).norm(dim=-1)
    size = expected.flatten(2).norm(dim=-1)
    relative = wrong / torch.where(size == 0, 1.0, size)
    return float(relative.max()) if bool(relative.isfinite().all()) else float("inf")


@functools.lru_cache(4)
def _expected(shape: Shape) -> list[tuple[Case, torch.Tensor]]:
    """Return the calls with what is right for them; kernels are tested one after the other on the same."""
    return [(each, each.expected()) for each in cases(shape)]


@functools.lru_cache(1024)
def verdict(kernel: str, shape: Shape) -> str | None:
    """Return what is wrong with a kernel here, with the figure; None if it passes in everything that it claims."""
    bound = tolerances.of_attention(shape.dtype)
    with torch.no_grad():
        for each, expected in _expected(shape):
            if KERNELS[kernel].obstacle(each.question) is not None:
                continue
            try:
                found = difference(each.found(KERNELS[kernel]), expected)
            except Exception as error:  # whatever the kernel's package raises
                return f"its self-test ({each.name}) failed ({described(error)})"
            if not found <= bound:
                return f"its self-test ({each.name}) is off by {found:.1e} of a query; rounding explains {bound:.0e}"
    return None
