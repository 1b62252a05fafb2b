"""The attention back end `hfaccel_grouped`: transformers' sdpa, except where that would expand grouped keys and values.

transformers (to 5.24) expands K and V (`repeat_kv`) whenever a mask is present and there is more than one query: at
every verification step of speculation, every chunk, every padded prompt. Measured in 5.23: 6 times the time and 100
times the temporary memory of attention on K and V as they are.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_accel.attention.held import held_attention
from hf_accel.attention.registry import register
from hf_accel.attention.static import attend_static
from hf_accel.core.calls.held import CachedStates
from hf_accel.core.model.back_ends import BackEnd
from hf_accel.ops.attention import grouped_attention


class BackEndName(str):
    """The name of a back end in the config of an optimised model; copies and pickles of it say "sdpa".

    A deep copy or a saved pickle of an optimised model is a stock model, which works where hf_accel is not installed.
    Models that compare the name, to choose the form of their masks, find it equal to "sdpa", whose masks this takes;
    its hash is that of its own letters, so that registries, which are dictionaries, keep the two apart.
    """

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == "sdpa"

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type, tuple[str]]:
        return str, ("sdpa",)


# a name without "flash", "sdpa" or "flex", which transformers would take for its own back ends
NAME = BackEndName("hfaccel_grouped")
MAX_QUERIES = 16
_fused_attention = functional.scaled_dot_product_attention
FOREIGN = ("position_bias", "s_aux", "cache")  # what some architectures hand to attention, and only stock's understands


def grouped_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention: query [B, H, T, D] -> ([B, T, H, D], None)."""
    if isinstance(key, CachedStates):
        if isinstance(value, CachedStates) and value.held is key.held:
            static, softcap = key.held.static, kwargs.get("softcap")
            if static is not None and not dropout and kwargs.get("position_bias") is None:
                output = attend_static(query, static, scaling, softcap, kwargs.get("s_aux"))
                return output.transpose(1, 2).contiguous(), None
            unknown = {name for name in FOREIGN if kwargs.get(name) is not None}
            if not dropout and not unknown and not _is_bias(attention_mask):
                is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
                output = held_attention(query, key.held, attention_mask, scaling, kwargs.get("softcap"), is_causal)
                return output.transpose(1, 2).contiguous(), None
        key, value = key.held.dense()[0], value.held.dense()[1] if isinstance(value, CachedStates) else value
    groups = getattr(module, "num_key_value_groups", 1)
    tokens = query.shape[2]
    causal = tokens > 1 and attention_mask is None and (is_causal if is_causal is not None else True)
    plain = not causal and not dropout and kwargs.get("position_bias") is None and kwargs.get("cache") is None
    stock: Any = ALL_ATTENTION_FUNCTIONS.get("sdpa", sdpa_attention_forward)  # the user's, where one was registered
    is_own = stock is sdpa_attention_forward and functional.scaled_dot_product_attention is _fused_attention
    fits = groups != 1 and query.shape[1] == groups * key.shape[1] and tokens <= MAX_QUERIES
    if not is_own or not fits or not plain or kwargs.get("softcap") is not None:
        return stock(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    output = grouped_attention(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


def _is_bias(mask: torch.Tensor | None) -> bool:
    """Return whether a mask does more than hide: attention over codes knows only visible or not."""
    if mask is None or mask.dtype is torch.bool:
        return False
    return not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all())


def _mask(*args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS.get("sdpa", sdpa_mask)(*args, **kwargs)


# as sdpa does, it leaves out soft caps where keys and values are tensors
register(BackEnd(name=NAME, masks="boolean", reads_held=True), grouped_attention_forward, _mask)
