"""Whether the tokens that a step fed to a cache can be taken back, and the past of windows that this needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from hf_accel.core.calls.cache_layers import rows_apart_obstacle
from hf_accel.core.calls.recurrent import EMPTY, KNOWN, is_recurrent


def rollback_obstacle(cache: Any, is_batch: bool) -> str | None:
    """Return why steps over `cache` cannot be taken back, None if they can; the cache has seen the prompt."""
    if not isinstance(cache, Cache):
        return f"there is no cache to take steps back in ({type(cache).__name__})"
    if cache.offloading:
        return "the cache is offloaded by transformers"
    for layer in cache.layers:
        if isinstance(layer, EMPTY):
            continue
        if is_recurrent(layer):
            if type(layer) not in KNOWN:
                return f"a {type(layer).__name__} of the cache cannot take steps back"
            if is_batch:
                return f"rows of a {type(layer).__name__} cannot have different lengths"
            continue
        # quantized layers inherit `crop` and claim to be croppable, but drop only what is not quantized yet
        if not isinstance(layer, DynamicLayer) or isinstance(layer, QuantizedLayer) or not layer.is_croppable:
            return f"a {type(layer).__name__} of the cache cannot take steps back"
        if hasattr(layer, "update_indexer"):  # among equal scores, the best k are others in a matrix of another shape
            return f"keys of a {type(layer).__name__} are chosen otherwise in steps of several tokens"
        if is_batch and (reason := rows_apart_obstacle(layer)):
            return reason
    return None


@contextmanager
def recording(cache: Any) -> Iterator[None]:
    """Let the windows of `cache` keep their past for the block, so that steps can be taken back beyond them."""
    windows = record(cache)
    try:
        yield
    finally:
        stop_recording(windows)


def record(cache: Any) -> list[Any]:
    """Let the windows of `cache` keep their past from now on, and return them; recurrent states are copied instead."""
    found = [
        layer
        for layer in cache.layers
        if not getattr(layer, "record_past", True) and (getattr(layer, "is_sliding", False) or not is_recurrent(layer))
    ]
    for layer in found:
        layer.activate_past_recording()
    return found


def stop_recording(layers: list[Any]) -> None:
    """Let windows forget again what they cannot see, as they do in a plain call."""
    for layer in layers:
        if getattr(layer, "record_past", False):
            if layer.is_initialized:
                layer.crop(0)
            layer.record_past = False
