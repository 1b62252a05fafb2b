"""Attention in transformers' calling convention: who answers which call of an optimised model.

Few queries read grouped keys and values as they are: transformers (to 5.24) expands K and V (`repeat_kv`) whenever a
mask is present and there is more than one query: at every verification step of speculation, every chunk, every padded
prompt. Measured in 5.23: 6 times the time and 100 times the temporary memory of attention on K and V as they are.
Prompts are answered by the model's ladder of kernels, what a cache holds as it lies by attention over that; all else
(training, dropout, what some architectures add) by stock's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import output_capturing

from hf_accel.attention.held import held_attention
from hf_accel.attention.masks import is_bias, make_mask, seen
from hf_accel.attention.names import EAGER_NAME, NAME, name_in
from hf_accel.attention.registry import register
from hf_accel.attention.static import attend_static
from hf_accel.attention.stock import eager_attention, is_untouched, plain, stock_sdpa
from hf_accel.core.calls.held import CachedStates
from hf_accel.core.model.back_ends import BackEnd
from hf_accel.ops.attention import grouped_attention

MAX_QUERIES = 16
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
            if key.held.members is not None:  # each call's attention is what it is alone
                found = [
                    grouped_attention_forward(
                        module, query[m.rows], m.keys, m.values, m.mask, dropout, scaling, is_causal, **kwargs
                    )[0]
                    for m in key.held.members
                ]
                return torch.cat(found), None
            static, softcap = key.held.static, kwargs.get("softcap")
            if static is not None and not dropout and kwargs.get("position_bias") is None:
                output = attend_static(query, static, scaling, softcap, kwargs.get("s_aux"))
                return output.transpose(1, 2).contiguous(), None
            unknown = {name for name in FOREIGN if kwargs.get(name) is not None}
            if not dropout and not unknown and not is_bias(attention_mask):
                is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
                output = held_attention(query, key.held, attention_mask, scaling, kwargs.get("softcap"), is_causal)
                return output.transpose(1, 2).contiguous(), None
        key, value = key.held.dense()[0], value.held.dense()[1] if isinstance(value, CachedStates) else value
    name = name_in(getattr(module, "config", None)) or NAME
    is_eager, ladder, tokens = name.stands_for == "eager", name.ladder, query.shape[2]

    def stock() -> tuple[torch.Tensor, Any]:
        run = eager_attention if is_eager else stock_sdpa()
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return run(module, query, key, value, plain(attention_mask), **options)  # type: ignore[no-any-return]

    if dropout or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        return stock()
    if is_eager:
        if output_capturing._active_collector.get():  # weights are wanted
            return stock()
    elif kwargs.get("softcap") is not None or not is_untouched():
        return stock()
    causal = tokens > 1 and attention_mask is None and (is_causal if is_causal is not None else True)
    if tokens <= MAX_QUERIES and (ladder is None or not ladder.is_probe):
        groups = getattr(module, "num_key_value_groups", 1)
        is_stocks = is_eager or causal or groups == 1 or (ladder is not None and not ladder.reads_grouped)
        if is_stocks or query.shape[1] != groups * key.shape[1]:
            return stock()
        return grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    if ladder is None or is_special(query, key, value):
        return stock()
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    visible = seen(attention_mask, tokens, key.shape[2], is_causal)
    if visible is None:
        return stock()
    if visible.mask is None and visible.band is None and is_causal and tokens > 1:
        key, value = key[:, :, :tokens], value[:, :, :tokens]  # of static buffers that are still empty beyond
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux") if is_eager else None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    output = ladder.attend(module, query, key, value, visible, scale, softcap, sinks, lambda: stock()[0])
    return output, None


def is_special(*states: torch.Tensor) -> bool:
    """Return whether states are no plain tensors of one dtype, or are to be differentiated, traced or cast."""
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in states))
        or any(type(x) is not torch.Tensor or x.dtype is not states[0].dtype for x in states)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled(states[0].device.type)
        or not all(x.numel() for x in states)
        or bool(states[0].shape[1] % states[1].shape[1])
    )


# as sdpa does, it leaves out soft caps where keys and values are tensors
register(BackEnd(name=NAME, masks="boolean", reads_held=True), grouped_attention_forward, make_mask)
register(
    BackEnd(name=EAGER_NAME, masks="boolean", soft_caps=True, reads_held=True), grouped_attention_forward, make_mask
)
