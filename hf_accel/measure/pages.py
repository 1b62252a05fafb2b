"""What large pages gain on this machine: the same products over weights in small and in large pages, in alternation."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels import native, pages

_BYTES = 256 << 20  # in either kind of pages: more than the caches of one machine's share
_COLUMNS, _ROWS = 4096, 4096
_PASSES = 7


@dataclass(frozen=True)
class PageTrial:
    """Bytes per second that products read in small and in large pages, and what large pages cost to make.

    seconds_per_gb: of putting large pages beneath memory in use.
    """

    small: float
    large: float
    seconds_per_gb: float

    @property
    def gain(self) -> float:
        return self.large / self.small

    def to_dict(self) -> dict[str, Any]:
        return {"what": "large pages", **asdict(self)}

    def __str__(self) -> str:
        return (
            f"large pages: a sample of products reads {self.large / 1e9:.1f} GB/s in large pages and "
            f"{self.small / 1e9:.1f} in small ones ({self.gain:.2f} x), {self.seconds_per_gb:.2f} s per GB to make them"
        )


@functools.cache
def page_trial(dtype: torch.dtype = torch.bfloat16) -> PageTrial | None:
    """Return what a trial shows, made once per process and dtype; None where memory is too short for it.

    Cost: 512 MiB for the trial's half a second to two seconds.
    """
    dtype = dtype if dtype in native.DTYPES else torch.float32
    try:
        small, large = (_weights(dtype, are_large) for are_large in (False, True))
    except RuntimeError:  # no memory for it
        return None
    begin = time.perf_counter()
    for weight in large:
        pages.collapse(weight)
    seconds = time.perf_counter() - begin
    times: tuple[list[float], list[float]] = [], []
    x = torch.ones(1, _COLUMNS, dtype=dtype)
    with torch.inference_mode():
        for _ in range(_PASSES):
            for weights, found in zip((small, large), times):
                begin = time.perf_counter()
                for weight in weights:
                    _product(x, weight)
                found.append(time.perf_counter() - begin)
    size = sum(weight.nbytes for weight in small)
    slow, fast = (size / min(found) for found in times)
    return PageTrial(slow, fast, seconds / size * 1e9)


def _weights(dtype: torch.dtype, are_large: bool) -> list[Tensor]:
    shape = _BYTES // (_ROWS * _COLUMNS * dtype.itemsize), _ROWS, _COLUMNS
    whole = torch.empty(shape, dtype=dtype)
    pages.advise(whole, large=False)  # what is made large is collapsed, as weights in use are
    whole.fill_(0.01)
    if are_large:
        pages.advise(whole)
    return list(whole)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return native.linear(x, weight) if native.is_available() else torch.nn.functional.linear(x, weight)
