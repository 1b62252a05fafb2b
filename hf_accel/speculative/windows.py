"""A copy of a model with small windows, so that a short text passes them.

Caches forget what has left a window, and masks hide it; where a model has the one and not the other, stock itself
writes other logits token by token than in one pass, and only past the window. That would take a text of thousands of
tokens to see; with windows of a few it takes a dozen, and masks and caches read the same configs.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from hf_accel.core.model.layer_list import layer_list
from hf_accel.speculative.forms import shadow, without_layers

NARROW = 9
LAYERS = 8  # of a copy: patterns of layers repeat sooner
NAME = re.compile(r"(sliding|attention|attn|local)_.*(window|chunk)(_size|_len(gth)?)?|sliding_window|window(_size)?")


def windows_of(config: Any) -> dict[str, int]:
    """Return the sizes of windows that a config names."""
    values = vars(config).items()
    return {name: size for name, size in values if NAME.fullmatch(name) and type(size) is int and size > NARROW}


def widest_window(model: Any) -> int | None:
    """Return the size of the widest window in the caches or the text's config of `model`, None where there is none."""
    config = model.config.get_text_config(decoder=True)
    return max([*_in_cache(config), *windows_of(config).values()], default=None)


def _in_cache(config: Any) -> list[int]:
    layers: list[Any] = DynamicCache(config=config).layers
    return [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]


def narrowed(model: Any) -> tuple[Any, list[int] | None, Any]:
    """Return a copy with windows of NARROW tokens that shares all tensors, and what its caches are like.

    The latter are the layers of caches that it uses, None: all, and the config of caches.

    Raises:
        LookupError: a window could not be made narrow.
    """
    config = model.config.get_text_config(decoder=True)
    sizes = set(windows_of(config).values())
    copy = shadow(model)
    configs = [copy.config, copy.config.get_text_config(decoder=True)]
    for module in copy.modules():
        configs += [value for value in vars(module).values() if isinstance(value, PreTrainedConfig)]
        _narrow_module(module, sizes)
    for each in {id(each): each for each in configs}.values():
        for name, size in windows_of(each).items():
            if size in sizes:
                setattr(each, name, NARROW)
    if max(_in_cache(copy.config.get_text_config(decoder=True)), default=0) > NARROW:
        raise LookupError("its windows are set in a place of their own")
    return *_shortened(copy), copy.config


def _narrow_module(module: nn.Module, sizes: set[int]) -> None:
    for name, value in vars(module).items():
        if type(value) is int and value in sizes and ("window" in name or "chunk" in name):
            vars(module)[name] = NARROW


def _shortened(copy: Any) -> tuple[Any, list[int] | None]:
    """Return `copy` with its first layers and one of each kind, which say what all of them would."""
    try:
        count = len(layer_list(copy)[1])
    except LookupError:
        return copy, None
    kinds = getattr(copy.config.get_text_config(decoder=True), "layer_types", None) or [""] * count
    kept = set(range(LAYERS)) | {kinds.index(kind) for kind in set(kinds)}
    if count <= len(kept):
        return copy, None
    try:
        form = without_layers(copy, [index for index in range(count) if index not in kept])
    except (AttributeError, ValueError, TypeError, KeyError, IndexError):
        return copy, None
    return form.model, form.layers
