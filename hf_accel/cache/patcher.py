"""Gives the caches that `generate` makes the layers of this package. A cache of the caller's is never touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.cache.growing import GrowingLayer, GrowingSlidingLayer
from hf_accel.core.anatomy import Anatomy
from hf_accel.core.config import Config
from hf_accel.core.hosting import host_of
from hf_accel.core.journal import Journal
from hf_accel.core.patcher import Change, Fidelity, Patcher, Stage


@dataclass(frozen=True, kw_only=True)
class KVCacheConfig(Config):
    """A key/value cache that appends in place instead of concatenating at every token."""


class KVCachePatcher(Patcher[KVCacheConfig], config=KVCacheConfig):
    stage = Stage.CACHE
    fidelity = Fidelity.EXACT
    occupies = "key/value cache"

    def obstacles(self, anatomy: Anatomy) -> list[str]:
        if not anatomy.model._supports_default_dynamic_cache():
            return [f"{anatomy.architecture} does not use transformers' DynamicCache."]
        return []

    def patch(self, anatomy: Anatomy, journal: Journal) -> Change:
        journal.set_attribute(host_of(anatomy.model), "prepare_cache", use_growing_layers)
        return Change("keys and values are appended in place to growing buffers")


def use_growing_layers(cache: Any, expected_tokens: int) -> None:
    """Replace the still empty stock layers of `cache`; layers of other kinds (linear, quantized) stay."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    layer: Any
    for index, layer in enumerate(cache.layers):
        # the type first: layers of linear attention have no `is_initialized`
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer(expected_tokens)
        elif type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            sliding = GrowingSlidingLayer(layer.sliding_window, expected_tokens)
            sliding.record_past = layer.record_past
            cache.layers[index] = sliding
