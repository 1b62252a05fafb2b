"""What the layers of a model put into a cache, found out by a forward pass of two tokens over probing layers."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.core.calls.held import Held, Part
from hf_accel.core.drift import CACHE
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.shadow import twin
from hf_accel.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerShape:
    """kv_heads G; sizes: head sizes of keys and values; window: None for full attention; reads_held: whether the
    layer's attention takes what the cache holds as it is (`hf_accel.core.calls.held`), and does not ask for tensors."""

    kv_heads: int
    sizes: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    window: int | None
    reads_held: bool


class _Probed(Held):
    is_dense = False

    def dense(self) -> Part:
        self.is_dense = True
        return super().dense()


class _ProbingLayer(GrowingLayer):
    held: _Probed

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states)
        found = self.buffers.held(0, self.buffers.stop)
        self.held = _Probed(found.shape, found.sizes, found.dtypes, found.device, found.bits, found.parts)
        return self.held.states()

    def reserve(self, *args: Any, **kwargs: Any) -> None:
        return None  # attention itself is asked, not a kernel for whole layers


def layer_shapes(model: Any) -> list[LayerShape] | str:
    """Return what each layer of the model's cache takes, or why its cache is not of layers that could be replaced."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    kinds = [type(layer) for layer in cache.layers]
    if not kinds:
        return "transformers does not say how many layers its cache has"
    if other := {kind.__name__ for kind in kinds} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}:
        return f"its cache has layers of other kinds ({', '.join(sorted(other))})"
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    cache.layers = [_ProbingLayer() for _ in kinds]
    probed = _probed(model)
    with evaluating(probed), torch.no_grad():
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        probed(input_ids=ids, use_cache=True, **{CACHE: cache})
    found = []
    for layer, window in zip(cache.layers, windows, strict=True):
        if not hasattr(layer, "held"):
            return "not all layers of its cache are written to"
        held = layer.held
        found.append(LayerShape(held.shape[1], held.sizes, held.dtypes, window, not held.is_dense))
    return found


def _probed(model: Any) -> Any:
    """Return a copy to probe, which other calls do not meet and hooks of the user's do not hear of."""
    copied = twin(model)
    for own, original in zip(copied.modules(), model.modules(), strict=True):
        if "config" in vars(own) and own is not original:  # copies of configs forget attention of ours
            vars(own.config)["_attn_implementation_internal"] = original.config._attn_implementation
    return copied


def autocast_dtype(model: Any) -> torch.dtype | None:
    """Return what autocast computes in on the model's device, None where it is off."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class ModelShapes:
    """The shapes of one model's layers; they follow its dtype, device, attention and autocast; found once for each."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], list[LayerShape]] = {}
        self._lock = threading.Lock()

    def of(self, model: Any) -> list[LayerShape]:
        """Return the shapes as the model is now. Raises UnsupportedModelError where its layers cannot be replaced."""
        ways = str(model.config._attn_implementation), model.dtype, model.device, autocast_dtype(model)
        with self._lock:
            if ways not in self._found:
                found = layer_shapes(model)
                if isinstance(found, str):
                    raise UnsupportedModelError(f"This model's cache stays as it is: {found}.")
                self._found[ways] = found
            return self._found[ways]
