"""Stock's attention, for what is not ours to serve: in transformers' calling convention, or as trials call it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_accel.attention.question import Visible
from hf_accel.core.calls.bands import band_of

_fused_attention = functional.scaled_dot_product_attention


def stock_sdpa() -> Any:
    """Return what stands as transformers' sdpa: its own, or the user's where one was registered."""
    return ALL_ATTENTION_FUNCTIONS.get("sdpa", sdpa_attention_forward)


def is_untouched() -> bool:
    """Return whether that is transformers' own, over torch's own."""
    return stock_sdpa() is sdpa_attention_forward and functional.scaled_dot_product_attention is _fused_attention


def eager_of(module: Any) -> Callable[..., Any] | None:
    """Return the eager attention of a model's own file, which is no entry of transformers' registry."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def eager_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> Any:
    """Return what the module's eager attention returns: it takes summands, and sees everything without a mask."""
    own = eager_of(module)
    if own is None:
        raise NotImplementedError(f"{type(module).__name__} has no eager attention in its file")
    is_causal = options.pop("is_causal", None)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    tokens, positions = query.shape[2], key.shape[2]
    if mask is None and is_causal and tokens > 1:
        mask = torch.ones(tokens, positions, dtype=torch.bool, device=query.device).tril(positions - tokens)[None, None]
    return own(module, query, key, value, _summand(mask, query.dtype), **options)


def _summand(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    mask = plain(mask)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def plain(mask: Any) -> Any:
    """Return a mask as the tensor that stock has."""
    band = band_of(mask)
    return mask if band is None else band.dense


def mask_of(visible: Visible) -> torch.Tensor | None:
    """Return the mask that stock would be given for what queries see."""
    return visible.mask if visible.band is None else visible.band.dense


class _Module(torch.nn.Module):
    """What transformers' sdpa reads of an attention module."""

    is_causal = True

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.num_key_value_groups = ratio


@functools.cache
def sdpa_trial(ratio: int) -> Callable[[Any], Any]:
    """Return transformers' sdpa as trials call it, for `ratio` query heads per key/value head."""
    module = _Module(ratio)

    def run(call: Any) -> Any:
        return stock_sdpa()(module, call.query, call.key, call.value, mask_of(call.visible))

    return run


def eager_trial(module: Any) -> Callable[[Any], Any]:
    """Return the eager attention of a module as trials call it."""

    def run(call: Any) -> Any:
        options = {"softcap": call.softcap, "s_aux": call.sinks}
        scaling = call.query.shape[3] ** -0.5
        return eager_attention(module, call.query, call.key, call.value, mask_of(call.visible), scaling=scaling,
                               dropout=0.0, **{name: x for name, x in options.items() if x is not None})  # fmt: skip

    return run
