"""What comparing values can tell: whether two computations agree, and which of several readings explains a value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
# the share of a value that rounding explains once it went through a few operations; a wrong reading is off by about 1
_AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}


_ROUNDING = 1e-7  # of single precision: readings that leave no more are as good as one another
_CLEARLY_LESS = 4


class Unexplained(Exception):
    """A part of a layer is not understood; the message is a clause for the user."""


def agreement(dtype: torch.dtype) -> float:
    """Return up to which relative difference two values computed in `dtype` count as the same."""
    return _AGREEMENT.get(dtype, 1e-4)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference (Frobenius) of two tensors of one shape; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / norm if norm > 0 else float("inf")


def agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors are the same up to rounding."""
    return difference(found, expected) <= agreement(dtype)


def the_best(readings: Iterable[tuple[float, R]], what: str) -> R:
    """Return the one reading that explains `what`: each comes with the error that it leaves.

    In few bits another reading may pass, too, where it differs little; then the one that leaves a quarter of the errors
    of all others.

    Raises: Unexplained, as `the_only`.
    """
    found = sorted(readings, key=lambda reading: reading[0])
    if len(found) > 1 and max(found[0][0], _ROUNDING) * _CLEARLY_LESS < found[1][0]:
        found = found[:1]
    return the_only((reading for _, reading in found), what)


def the_only(readings: Iterable[R], what: str) -> R:
    """Return the one reading that explains `what`.

    Raises: Unexplained where there is none, or where there are several, which differ elsewhere.
    """
    found = list(readings)
    if not found:
        raise Unexplained(f"nothing known explains {what}")
    if len(found) > 1:
        raise Unexplained(f"{len(found)} readings explain {what}")
    return found[0]
