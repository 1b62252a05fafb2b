"""Gives the caches that `generate` makes fixed buffers, where a call's steps can be replayed over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from hf_accel.compilation.call_layers import CallLayer, WindowCallLayer
from hf_accel.compilation.guard import ModelGuard
from hf_accel.compilation.sharing import TAKEN, Sharing
from hf_accel.compilation.slots import Slots
from hf_accel.compilation.statistics import CompilationStatistics
from hf_accel.core.calls.call import NewCache, request_in_progress
from hf_accel.core.calls.doors import CacheMaker

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class StaticCaches:
    """See `hf_accel.core.calls.doors.CacheMaker`. before: who made caches before, and makes those that are declined."""

    def __init__(
        self,
        slots: Slots,
        guard: ModelGuard,
        statistics: CompilationStatistics,
        before: CacheMaker | None,
        model: int = 0,
    ) -> None:
        """model: which of the models that run in one call they are for, by a number."""
        self.slots, self.guard, self.statistics, self.before = slots, guard, statistics, before
        self.model = model
        self.sharing: Sharing | None = None  # while calls join

    def fill(self, new: NewCache) -> None:
        """Give a cache that `generate` has just made its layers. Raises: as who made caches before."""
        reason = self._filled(new)
        if reason is not None:
            self.statistics.declined(reason)
            if self.before is not None:
                self.before.fill(new)

    def bits(self, new: NewCache) -> tuple[int | None, str | None]:
        """See `hf_accel.core.calls.doors.CacheMaker`."""
        return (None, None) if self.before is None else self.before.bits(new)

    def _filled(self, new: NewCache) -> str | None:
        """Give the cache layers over a slot, or return why not."""
        request = request_in_progress()
        if new.mode not in MODES or request is None:
            return "another strategy than greedy decoding and sampling"
        bits, reason = self.bits(new)
        reason = reason or cache_obstacle(new.cache) or self.guard.obstacle()
        starts: torch.Tensor | None = None
        if reason is None:
            starts, reason = starts_of(new.mask, new.rows)
        if reason is not None:
            return reason
        if self.sharing is not None:
            use_slot(new.cache, self.sharing.claim(new, request, bits, starts, self.before))
            return None
        slot = self.slots.take(new.cache, request, new.rows, new.expected_tokens, bits, starts, self.model)
        if slot is None:
            return TAKEN
        use_slot(new.cache, slot)
        return None


def cache_obstacle(cache: Any) -> str | None:
    """Return why the layers of a cache that is still empty cannot be replaced by ours, None if they can."""
    if type(cache) is not DynamicCache or cache.offloading:
        return f"the cache is a {type(cache).__name__}"
    layer: Any
    for layer in cache.layers:
        # the type first: layers of linear attention have no `is_initialized`
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"the cache has a {type(layer).__name__}"
        if layer.is_initialized:
            return "the cache is not empty"
    if not cache.layers and cache.layer_class_to_replicate is not DynamicLayer:
        return "the cache makes layers of another kind"
    return None


def use_slot(cache: Any, slot: Any) -> None:
    """Replace the layers of a cache, for which there is no `cache_obstacle`, by layers over a slot or a claim."""
    cache.layers = [
        WindowCallLayer(slot, index, layer.sliding_window) if layer.is_sliding else CallLayer(slot, index)
        for index, layer in enumerate(cache.layers)
    ]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = partial(_next_layer, cache.layers, slot)


def _next_layer(layers: list[Any], slot: Any) -> CallLayer:
    return CallLayer(slot, len(layers))


def starts_of(mask: torch.Tensor | None, rows: int) -> tuple[torch.Tensor | None, str | None]:
    """Return the first column of each row that is no padding, int64 [rows], None for 0; and why there is none.

    mask: [B, T] of the prompt, where rows is a multiple of B: returned sequences lie one after the other.
    """
    if mask is None:
        return None, None
    if mask.dim() != 2 or rows % mask.shape[0]:
        return None, "the mask is not one of padding"
    visible = mask.bool().cpu()  # one look per call
    if bool(visible.all()):
        return None, None
    starts = visible.shape[1] - visible.sum(1)
    if not bool((visible == (torch.arange(visible.shape[1]) >= starts[:, None])).all()):
        return None, "the mask hides more than padding on the left"
    return starts.repeat_interleave(rows // len(starts)), None
