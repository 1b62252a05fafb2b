"""Rows that leave a cache: whether its layers let them, and how. See `hf_accel.core.calls.present`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.core.calls.recurrent import EMPTY, KNOWN, is_recurrent

STOCK = frozenset({DynamicLayer, DynamicSlidingWindowLayer, *KNOWN})


def rows_stay(layer: Any, rows: int) -> str | None:
    """Return why rows of a cache layer stay when `rows` of them still go on, None if the others can leave."""
    if callable(own := getattr(layer, "rows_stay", None)):  # a layer of ours
        return str(reason) if (reason := own(rows)) else None
    return None if isinstance(layer, EMPTY) or type(layer) in STOCK else f"rows of a {type(layer).__name__} stay"


def cache_rows_stay(cache: Any, rows: int) -> str | None:
    """Return why rows that have ended stay in a cache while `rows` go on, None if they can leave or there is none."""
    if cache is None:
        return None
    if type(cache) is not DynamicCache or cache.offloading:
        return f"rows of {'an offloaded' if getattr(cache, 'offloading', False) else 'a'} {type(cache).__name__} stay"
    return next((reason for layer in cache.layers if (reason := rows_stay(layer, rows))), None)


def moves_single_rows(layers: list[Any]) -> bool:
    """Return whether cache layers move rows one by one, where others copy all that stay."""
    return all(hasattr(layer, "keep_rows") or isinstance(layer, EMPTY) for layer in layers)


def keep_rows(layers: list[Any], slots: list[int], device: torch.device, *, gives_back: bool) -> int:
    """Let row b of cache layers be what row slots[b] was, and nothing else remain; return the bytes that were freed.

    gives_back: layers move to smaller memory, where they would keep that of the rows that are gone.
    """
    index, freed = torch.tensor(slots, device=device), 0
    for layer in layers:
        if hasattr(layer, "keep_rows"):
            freed += layer.keep_rows(slots, gives_back=gives_back)
        elif is_recurrent(layer):  # `batch_select_indices` is that of keys and values alone there
            layer.reorder_cache(index)
        else:
            layer.batch_select_indices(index)
    return freed
