"""Gives caches that `generate` makes the layers that a config asks for. A cache of the caller's is never touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.cache.config import KVCacheConfig
from hf_accel.cache.division import divide
from hf_accel.cache.layers.evicting import EvictingLayer
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.cache.layers.tiered import TieredLayer
from hf_accel.cache.prefix.reuse import PrefixReuse
from hf_accel.cache.probing import ModelShapes
from hf_accel.cache.statistics import CacheStatistics
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.core.calls.call import NewCache
from hf_accel.core.drift import CACHE

# strategies that take steps back or exchange rows, which is impossible once positions have been given up
WHOLE = {
    GenerationMode.ASSISTED_GENERATION: "assisted generation",
    GenerationMode.BEAM_SEARCH: "beam search",
    GenerationMode.BEAM_SAMPLE: "beam search",
}


def use_growing_layers(cache: Any, expected_tokens: int) -> None:
    """Replace the still empty stock layers of `cache`; layers of other kinds (linear, quantized) stay."""
    CacheAssembly(KVCacheConfig(), ModelShapes(), CacheStatistics()).replace(cache, expected_tokens)


class CacheAssembly:
    """Makes the layers that one config asks for, for the caches of one model."""

    def __init__(
        self,
        config: KVCacheConfig,
        shapes: ModelShapes,
        statistics: CacheStatistics,
        prefixes: PrefixReuse | None = None,
    ) -> None:
        self.config, self.shapes, self.statistics, self.prefixes = config, shapes, statistics, prefixes

    def fill(self, new: NewCache) -> None:
        """Give a cache that `generate` has just made its layers.

        Raises:
            ConfigError: budgets too small for one block of the batch.
        """
        config, cache = self.config, new.cache
        if type(cache) is not DynamicCache or cache.offloading:
            if config != KVCacheConfig():
                self.statistics.skipped(f"the call asked for a {type(cache).__name__} of transformers'")
            return
        full: Any = None
        codec = Codec(config.bits)
        what = ["as it is" if config.bits is None else f"{config.bits} bits"]
        if config.bits is not None and new.expected_tokens < config.from_tokens:
            self.statistics.skipped(f"codes do not pay below {config.from_tokens} tokens")
            codec, what = AS_IS, ["as it is"]
        if config.method is not None:
            if reason := WHOLE.get(new.mode):
                self.statistics.skipped(f"nothing is given up in {reason}")
            else:
                full = self._evicting(new, codec)
                what.append(config.method)
        elif config.store != "device":
            full = self._tiered(new, codec)
            what.append(config.store)
        self.replace(cache, new.expected_tokens, codec, full)
        self.statistics.made(", ".join(what))

    def bits(self, new: NewCache) -> tuple[int | None, str | None]:
        """See `hf_accel.core.calls.doors.CacheMaker`."""
        config = self.config
        if config.method is not None:
            return None, f"the cache gives positions up ({config.method})"
        if config.store != "device":
            return None, "older blocks of the cache lie elsewhere"
        if config.prefix_reuse:
            return None, "prompts take over keys and values of earlier ones"
        return (config.bits if new.expected_tokens >= config.from_tokens else None), None

    def replace(self, cache: Any, expected_tokens: int, codec: Codec = AS_IS, full: Any = None) -> None:
        """Replace the still empty stock layers; `full(index)` makes those of full attention."""
        if type(cache) is not DynamicCache or cache.offloading:
            return
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = partial(GrowingLayer, expected_tokens, codec)  # type: ignore[assignment]
        layer: Any
        for index, layer in enumerate(cache.layers):
            # the type first: layers of linear attention have no `is_initialized`
            if type(layer) is DynamicLayer and not layer.is_initialized:
                cache.layers[index] = full(index) if full else GrowingLayer(expected_tokens, codec)
            elif type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
                sliding = GrowingSlidingLayer(layer.sliding_window, expected_tokens, codec)
                sliding.record_past = layer.record_past
                cache.layers[index] = sliding

    def _tiered(self, new: NewCache, codec: Codec) -> Any:
        config, device = self.config, new.model.device
        division = divide(config, codec, self.shapes.of(new.model), new.rows, new.expected_tokens, device)
        tiers = Tiers(
            device,
            store=config.store,  # type: ignore[arg-type]
            near_budget_bytes=division.near_bytes,
            cpu_budget_bytes=division.cpu_bytes,
            folder=config.folder,
            prefetch=config.prefetch,
        )
        self.statistics.watch(tiers.peak_bytes, tiers.notes)
        return lambda index: TieredLayer(index, tiers, division.block_tokens, codec)

    def _evicting(self, new: NewCache, codec: Codec) -> Any:
        config, statistics = self.config, self.statistics
        mask = new.mask
        if mask is not None and (mask.dim() != 2 or bool(mask.all())):
            mask = None

        def make(index: int) -> EvictingLayer:
            noted = statistics.evicted if index == 0 else None
            return EvictingLayer(config, None if mask is None else mask.bool(), codec, noted)

        return make

    @contextmanager
    def prefilling(
        self, model: Any, input_ids: torch.Tensor, generation_config: Any, kwargs: dict[str, Any], tenant: str | None
    ) -> Iterator[None]:
        """Wrap the forward pass over the prompt, which begins where stored keys and values end."""
        if self.prefixes is None:
            yield
            return
        reason = self.prefixes.obstacle(model, input_ids, generation_config, kwargs)
        if reason is not None:
            self.statistics.skipped(f"prefixes are not reused: {reason}")
            yield
            return
        self.prefixes.store.resize(self.config.prefix_budget_bytes)
        with self.prefixes.reusing(model, kwargs[CACHE], input_ids, kwargs.get("attention_mask"), tenant):
            yield
