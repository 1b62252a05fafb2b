"""Which modules of a model are recurrent mixers, and how one may be read."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from hf_accel.recurrent import delta, scan, short_conv, ssd
from hf_accel.recurrent.forms import Form, Sizes, depthwise
from hf_accel.recurrent.step import cache_keyword

KINDS = (delta, ssd, scan, short_conv)
TITLES = tuple(kind.TITLE for kind in KINDS)


def mixers_of(model: nn.Module) -> dict[str, Any]:
    """Return path -> module of what keeps a short convolution's state in the cache, in the order of the layers."""
    return {path: module for path, module in model.named_modules() if _is_mixer(module)}


def _is_mixer(module: nn.Module) -> bool:
    if len(depthwise(module)) != 1 or not isinstance(getattr(module, "layer_idx", None), int):
        return False
    names = list(inspect.signature(module.forward).parameters)
    return names[:1] == ["hidden_states"] and bool(cache_keyword(module))


def readings(module: Any, sizes: Sizes) -> list[Form]:
    """Return what a mixer with states of such sizes may be, the likelier first."""
    if sizes.conv[0] != module._modules[depthwise(module)[0]].in_channels:
        return []
    return [form for kind in KINDS for form in kind.forms(module, sizes)]
