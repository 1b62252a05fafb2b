"""Applies a cache config to a model, and understands `generate(kv_cache=...)`."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakValueDictionary

import torch

from hf_accel.cache.assembly import CacheAssembly, use_growing_layers
from hf_accel.cache.codec import Codec
from hf_accel.cache.config import KVCacheConfig
from hf_accel.cache.prefix.files import PrefixFiles
from hf_accel.cache.prefix.reuse import PrefixReuse, prefix_obstacle
from hf_accel.cache.prefix.store import PrefixStore
from hf_accel.cache.probing import ModelShapes, layer_shapes
from hf_accel.cache.statistics import CacheStatistics
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host, host_of
from hf_accel.core.calls.keywords import Keyword, register
from hf_accel.core.calls.report import SECTIONS, Applied, Skip
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.core.steps.goal import Gain, Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.kernels import native
from hf_accel.measure.break_even import break_even

MOST_CONFIGS = 16  # of calls, that stay set up
SECTION = "kv_cache"
DOORS = (Door.NEW_CACHE, Door.PREFILL)
CALLERS_CACHES = {CACHE, "past_key_values", "cache", "cache_implementation"}


class KVCachePatcher(Patcher[KVCacheConfig], config=KVCacheConfig):
    stage = Stage.CACHE
    fidelity = Fidelity.EXACT
    occupies = "key/value cache"
    gain = Gain.OVERHEAD

    def __init__(self, config: KVCacheConfig) -> None:
        super().__init__(config)
        self.fidelity = Fidelity.LOSSY if config.is_lossy else Fidelity.EXACT
        # only attention of ours goes over parts, or knows what was given up
        self.needs = ("AttentionConfig",) if _needs_attention(config) else ()

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer([KVCacheConfig()], break_even_of_codes(setting.model) if goal.is_lossy else [])

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy, config = setting.anatomy, self.config
        model = anatomy.model
        if not model._supports_default_dynamic_cache():
            return [f"{anatomy.architecture} does not use transformers' DynamicCache."]
        if config.prefix_reuse and (reason := prefix_obstacle(model)):
            return [f"prompts of {anatomy.architecture} cannot take over keys and values: {reason}."]
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        statistics = CacheStatistics()
        caching = set_up(setting.model, host, self.config, statistics)
        for door in DOORS:
            host.stand(door, caching)
        host.stand(Door.DRAFT_CACHE, use_growing_layers)
        if self.config != KVCacheConfig():
            host.report.sections[SECTION] = statistics
        return Change(_summary(self.config, setting.model, caching.shapes))


def _needs_attention(config: KVCacheConfig) -> bool:
    return config.store != "device" or config.method is not None


def set_up(model: Any, host: Host, config: KVCacheConfig, statistics: CacheStatistics) -> CacheAssembly:
    """Return what gives the model's caches the layers of `config`.

    Raises:
        UnsupportedModelError: the model's cache or attention does not allow it.
        ConfigError: a folder that cannot be written.
    """
    known = ModelShapes()  # growing layers as they are ask for none
    if config.bits is not None or _needs_attention(config) or config.prefix_reuse:
        known = _shapes(host)
        shapes = known.of(model)
        if config.bits == 4 and any(size % 2 for shape in shapes for size in shape.sizes):
            raise UnsupportedModelError("4 bits pack two values into a byte, but heads of this model have an odd size.")
    if _needs_attention(config):
        if not all(shape.reads_held for shape in shapes):
            raise UnsupportedModelError(
                "The attention of this model asks for all keys and values of a layer as tensors, so that they can "
                "neither lie elsewhere nor be given up. Load it with attn_implementation='sdpa' if it supports that; "
                "bits and prefix_reuse work in any case."
            )
        if config.method is not None and any(shape.window for shape in shapes):
            raise UnsupportedModelError(
                "Some layers of this model have a sliding window of their own; what the others give up would have to "
                "share their masks. Use bits or store instead of eviction."
            )
    prefixes = None
    if config.prefix_reuse:
        if reason := prefix_obstacle(model):
            raise UnsupportedModelError(f"Prompts of this model cannot take over keys and values: {reason}.")
        prefixes = PrefixReuse(_store(host, config, statistics), Codec(config.bits), known)
    if config.store == "disk":
        from hf_accel.cache.tiers.spill import Spill

        Spill(config.folder).close()  # a folder that cannot be written is an error now, not at the first call
    return CacheAssembly(config, known, statistics, prefixes)


def _shapes(host: Host) -> ModelShapes:
    with host.lock:
        shapes: ModelShapes = host.built.setdefault("cache shapes", ModelShapes())
        return shapes


def _store(host: Host, config: KVCacheConfig, statistics: CacheStatistics) -> PrefixStore:
    """Return the model's store for a folder, or for none: configs that differ in other things share it.

    Its budget is that of the call in progress, so that any number of budgets take no more memory than one of them.
    """
    with host.lock:
        # lives as long as a config that is at work or kept for later calls
        stores: Any = host.built.setdefault("prefixes", WeakValueDictionary())
        found: PrefixStore | None = stores.get(config.prefix_folder)
        if found is None:
            files = None if config.prefix_folder is None else PrefixFiles(config.prefix_folder)
            found = stores[config.prefix_folder] = PrefixStore(config.prefix_budget_bytes, files=files)
        store = found

        def counts() -> dict[str, Any]:
            # names of tenants are theirs
            counted = dataclasses.asdict(dataclasses.replace(store.statistics(), tenants={}))
            return {name: value for name, value in counted.items() if name != "tenants"}

        statistics.prefixes = counts
        return store


def break_even_of_codes(model: Any) -> list[Skip]:
    """Say from how many tokens on a cache in 8 bits would pay; it is not applied unless it is named."""
    shapes = layer_shapes(model)
    if isinstance(shapes, str) or model.device.type != "cpu" or not native.is_available():
        return []
    config, shape = model.config.get_text_config(decoder=True), shapes[-1]
    if shape.dtypes[0] not in native.DTYPES or max(shape.sizes) > native.MAX_HEAD_DIM:
        return []
    tokens = break_even(config.num_attention_heads, shape.kv_heads, shape.sizes, shape.dtypes[0], 8)
    reason = (
        "attention over codes is not faster up to 8,192 tokens here"
        if tokens is None
        else (f"attention over codes is faster from {tokens:,} tokens on here; contexts as long can name it")
    )
    return [Skip("KVCacheConfig(bits=8)", reason)]


def _summary(config: KVCacheConfig, model: Any, known: ModelShapes) -> str:
    if config == KVCacheConfig():
        return "keys and values are appended in place to growing buffers"
    parts = []
    if config.bits is not None:
        codec, shapes = Codec(config.bits), known.of(model)
        now = sum(codec.bytes_per_token(s.kv_heads, s.sizes, s.dtypes[0]) for s in shapes)
        before = sum(s.kv_heads * sum(s.sizes) * s.dtypes[0].itemsize for s in shapes)
        since = f" from {config.from_tokens} tokens on" if config.from_tokens else ""
        parts.append(f"{config.bits} bits{since}: {now:,} instead of {before:,} bytes per token ({now / before:.2f})")
    if config.store != "device":
        budget = "least" if config.device_budget_bytes is None else f"{config.device_budget_bytes:,} bytes"
        parts.append(f"the {budget} on the device, older blocks to {config.store}")
    if config.method is not None:
        parts.append(f"{config.method} leaves {config.capacity} tokens")
    if config.prefix_reuse:
        parts.append(f"prompts reuse prefixes, up to {config.prefix_budget_bytes:,} bytes")
    return "cache: " + "; ".join(parts)


def _missing(patcher: KVCachePatcher, host: Host) -> list[Patcher[Any]]:
    """Return the patchers of what the patcher needs and the model was optimised without."""
    applied = {type(step.config).__name__ for step in host.report.applied}
    needed = (name for name in patcher.needs if name not in applied)
    return [Patcher.for_config(Config.from_dict({"type": name})) for name in needed]


def _built(model: Any, host: Host, config: KVCacheConfig) -> CacheAssembly:
    """Set `config` up for calls that name it, with what it needs.

    Raises:
        UnsupportedModelError: the model does not allow it.
    """
    patcher, setting = KVCachePatcher(config), Setting.of(model)
    missing = _missing(patcher, host)
    if obstacles := [text for each in (patcher, *missing) for text in each.obstacles(setting)]:
        raise UnsupportedModelError("This call's kv_cache cannot be had: " + " ".join(obstacles))
    added = [(each, each.patch(setting, host)) for each in missing]
    statistics: Any = host.report.sections.get(SECTION) or CacheStatistics()
    with torch.no_grad():
        caching = set_up(model, host, config, statistics)
    for each, change in added:
        fidelity = each.fidelity.value
        host.report.applied.append(Applied(each.config, f"per call: {change.summary}", change.extra_bytes, fidelity))
    if config != KVCacheConfig():
        host.report.sections[SECTION] = caching.statistics
    return caching


def _kv_cache(model: Any, value: Any, arguments: dict[str, Any]) -> CacheAssembly:
    """Understand `generate(kv_cache=...)`: a KVCacheConfig, or False for the layers that go with any model.

    Raises:
        ConfigError: neither, or what the call asks for excludes it.
        UnsupportedModelError: the model does not allow it.
    """
    config = KVCacheConfig() if value is False else value
    if not isinstance(config, KVCacheConfig):
        raise ConfigError(f"kv_cache is a KVCacheConfig, or False; {value!r} was given.")
    general = arguments.get("generation_config") or model.generation_config

    def given(name: str) -> Any:
        return arguments.get(name, getattr(general, name, None))

    if own := sorted(name for name in CALLERS_CACHES if given(name) is not None):
        raise ConfigError(f"kv_cache and {own[0]} both say what the cache is; give one of them.")
    if given("use_cache") is False:
        raise ConfigError("kv_cache was given together with use_cache=False.")
    if config.method is not None and (given("num_beams") or 1) > 1:
        raise ConfigError(
            f"eviction ({config.method}) with num_beams={given('num_beams')}: beams would have to share what each of "
            "them gave up. Use bits or store with beams, or sampling with eviction."
        )
    if config.method is not None and (
        given("prompt_lookup_num_tokens") or arguments.get("assistant_model") is not None
    ):
        raise ConfigError(f"eviction ({config.method}) with assisted generation: steps back are not possible then.")
    if config.prefix_reuse and arguments.get("inputs_embeds") is not None:
        raise ConfigError("prefix_reuse finds prompts by their tokens; inputs_embeds has none. Give input_ids.")
    host: Any = host_of(model)
    caching: CacheAssembly = host.built_once("kv_cache", config, MOST_CONFIGS, lambda: _built(model, host, config))
    return caching


register(Keyword("kv_cache", _kv_cache, DOORS))
SECTIONS[SECTION] = "cache"
