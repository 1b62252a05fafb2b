"""The masks of attention of ours: what they hide, and bands instead of tensors for prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from hf_accel.attention.names import name_in
from hf_accel.attention.question import Visible
from hf_accel.core.calls.bands import band_of, described

PLAIN_QUERIES = 32  # as many rows as native layers take, to which masks are given as they are


def make_mask(*args: Any, **kwargs: Any) -> Any:
    """Return the mask that transformers asks for: a band for prompts, else sdpa's."""
    make = ALL_MASK_ATTENTION_FUNCTIONS.get("sdpa", sdpa_mask)
    name = name_in(kwargs.get("config"))
    if name is not None and name.ladder is not None and name.ladder.takes_bands and make is sdpa_mask and not args:
        tokens = kwargs.get("q_length")
        is_long = name.ladder.is_probe or (type(tokens) is int and tokens > PLAIN_QUERIES)
        if is_long and not torch.is_grad_enabled() and (band := described(kwargs)) is not None:
            return band.mask() if band.has_effect or name.ladder.is_probe else None
    return make(*args, **kwargs)


def seen(mask: torch.Tensor | None, tokens: int, positions: int, is_causal: bool) -> Visible | None:
    """Return what the queries of a call see, None where the mask has a form that is not known."""
    if mask is None:
        return Visible(is_causal and tokens > 1)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[2:] != (tokens, positions):
        return None
    band = band_of(mask)
    return Visible(mask=mask) if band is None else Visible(True, band if band.has_effect else None)


def is_bias(mask: torch.Tensor | None) -> bool:
    """Return whether a mask does more than hide: attention over codes knows only visible or not."""
    if mask is None or mask.dtype is torch.bool:
        return False
    return not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all())
