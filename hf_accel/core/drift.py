"""What transformers calls differently from release to release, asked of the installed one."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import ALL_CACHE_NAMES

CACHE = ALL_CACHE_NAMES[0]
"""The keyword by which caches are handed on, and the field of outputs: `past_key_values` to 5.23, `cache` from 5.24."""

MIXER_CACHES = (CACHE, "cache_params")
"""The keywords by which recurrent mixers are handed the cache: `cache` from 5.24, before that either of two."""


def _initial_values_dtype(keys: torch.dtype, values: torch.dtype) -> torch.dtype:
    layer = DynamicLayer()
    layer.lazy_initialization(torch.empty(0, dtype=keys), torch.empty(0, dtype=values))
    return layer.values.dtype  # type: ignore[union-attr]


VALUES_FOLLOW_KEYS = _initial_values_dtype(torch.float32, torch.bfloat16) is torch.float32
"""Whether a cache layer first takes values in the keys' dtype where that is the wider: to 5.23, and not from 5.24."""
