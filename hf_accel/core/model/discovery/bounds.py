"""Reads beyond the end of a table become IndexError on every device.

On a CPU torch raises it. On a GPU the kernel stops with an assertion, after which the process can use the device no
more: whoever asks a model for positions that it may not have asks under `within_bounds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_ATEN = torch.ops.aten


class _Bounds(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | (kwargs or {})
        for size, indices in _READS.get(func.overloadpacket, _none)(given):
            if indices.dtype not in (torch.bool, torch.uint8) and indices.numel():
                least, most = (int(value) for value in torch.aminmax(indices))
                lowest = -size if func.overloadpacket in _FROM_THE_END else 0
                if least < lowest or most >= size:
                    raise IndexError(f"index {most if most >= size else least} of {size}")
        return func(*args, **(kwargs or {}))


def _none(given: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    return []


def _along(given: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    """Return how long the dimension is that is read, and the indices, of `gather` and `index_select`."""
    table = given["self"]
    return [(table.shape[given["dim"]], given["index"])] if table.dim() else []


def _indexed(given: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    """Return the same of each dimension that x[...] is given indices for."""
    table, masks = given["self"], (torch.bool, torch.uint8)
    if any(index is not None and index.dtype in masks for index in given["indices"]):
        return []  # masks take several dimensions; they cannot read beyond the end
    return [(size, index) for size, index in zip(table.shape, given["indices"]) if index is not None]


_READS: dict[Any, Any] = {
    _ATEN.embedding: lambda given: [(given["weight"].shape[0], given["indices"])],
    _ATEN.gather: _along,
    _ATEN.index_select: _along,
    _ATEN.index: _indexed,
    _ATEN.take: lambda given: [(given["self"].numel(), given["index"])],
}

_FROM_THE_END = frozenset({_ATEN.index, _ATEN.take})  # which count from the end where an index is negative


@contextmanager
def within_bounds() -> Iterator[None]:
    """For the length of the block, raise IndexError before a table is read beyond its end; each read is waited for."""
    with _Bounds():
        yield


@contextmanager
def unobserved() -> Iterator[None]:
    """For the length of the block, no mode of torch sees what is computed: a record takes thousands of steps."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
