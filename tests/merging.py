"""Caches of several texts as one whose rows lie where each text has them: what a scheduler of calls would give."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.core.calls.cache_layers import Reserved


def own_cache(model: Any, codec: Codec = AS_IS) -> Any:
    """A cache of layers that a kernel may write into."""
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [
        GrowingSlidingLayer(layer.sliding_window, codec=codec) if layer.is_sliding else GrowingLayer(codec=codec)
        for layer in cache.layers
    ]
    return cache


class MergedLayer(DynamicLayer):
    """One layer of several texts; only a kernel can write into it."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers, self.bits, self.is_initialized = layers, layers[0].bits, True
        self.is_sliding = layers[0].is_sliding

    def update(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a pass over rows of several texts was not native")

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self.layers)

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.get_seq_length() + 1, 0

    def reserve(self, batch: int, *args: Any) -> Reserved | None:
        found = [layer.reserve(1, *args) for layer in self.layers]
        if batch != len(found) or None in found:
            return None
        rows = [[keys.data_ptr(), values.data_ptr(), *keys.stride()[1:3], *values.stride()[1:3], past, first]
                for keys, values, past, first, *_ in found]  # fmt: skip
        pasts, firsts = ([one[field] for one in found] for field in (2, 3))
        return Reserved(*found[0][:2], max(pasts), min(firsts), None, torch.tensor(rows))

    def commit(self, tokens: int) -> None:
        for layer in self.layers:
            layer.commit(tokens)


def merged(caches: list[Any]) -> Any:
    """One cache of a row for each of these."""
    cache: Any = DynamicCache()
    cache.layers = [MergedLayer(list(layers)) for layers in zip(*(one.layers for one in caches), strict=True)]
    cache.layer_class_to_replicate = None
    return cache
