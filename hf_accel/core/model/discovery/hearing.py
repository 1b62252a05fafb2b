"""Hears the attention of a model that runs: what it was called with, and what came out.

It is heard under a name of ours in transformers' registry, which computes it plainly, or where torch's own is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_accel.core.model.back_end_names import BackEndName

# without "flash", "sdpa" or "flex", which transformers would take for its own; models that compare it take it for sdpa
NAME = BackEndName("hfaccel_heard", "sdpa")
_ATTRIBUTE = "_attn_implementation_internal"
_INERT = frozenset({"dropout", "position_ids", "use_cache", "sliding_window", "cache_position", "output_attentions"})


@dataclass
class Heard:
    """One call of attention: queries [B, H, T, D], keys and values [B, G, S, D], and what came out, [B, T, H, D].

    mask: as it was given, not a copy. options: what the module asked for beside these, as its name and value.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    options: dict[str, Any]
    output: Tensor


listener: ContextVar[list[Heard] | None] = ContextVar("hf_accel_listener", default=None)


def _heard_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' calling convention, computed plainly and kept for whoever listens."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, 1).float() for t in (key, value))
    scores = query.float() @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    tokens, positions = scores.shape[-2:]
    if attention_mask is None:
        visible = torch.ones(tokens, positions, dtype=torch.bool, device=scores.device).tril(positions - tokens)
        scores = scores.masked_fill(~visible, -torch.inf)
    elif attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask[..., :positions], torch.finfo(torch.float32).min)
    else:
        scores = scores + attention_mask[..., :positions].float()
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    output = (weights @ values).transpose(1, 2).to(query.dtype).contiguous()
    found = listener.get()
    if found is not None:
        rest = {name: option for name, option in options.items() if name not in _INERT and option is not None}
        if is_causal is False:
            rest["is_causal"] = False
        q, k, v = (t.detach().clone() for t in (query, key, value))
        found.append(Heard(module, q, k, v, attention_mask, float(scale), softcap, s_aux, rest, output.clone()))
    return output, None


AttentionInterface.register(str(NAME), _heard_attention)
AttentionMaskInterface.register(str(NAME), sdpa_mask)


_CLAMPS = frozenset({"clamp", "clamp_", "clip", "clip_", "minimum", "maximum", "clamp_min", "clamp_max"})


class Ear(TorchFunctionMode):
    """Hears attention of models that call torch's own instead of transformers' registry; and what clamps values.

    Whether values are clamped shows only where they are large, which those of a few random tokens may not be.
    """

    def __init__(self, running: Sequence[tuple[nn.Module, *tuple[Any, ...]]], clamps: list[list[nn.Module]]) -> None:
        super().__init__()
        self.running, self.clamps = running, clamps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        found = listener.get()
        if getattr(func, "__name__", "") in _CLAMPS:
            self.clamps.append([module for module, *_ in self.running])
        if func is functional.scaled_dot_product_attention and found is not None and self.running:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | (kwargs or {})
            query, key, value = (given[name].detach().clone() for name in ("query", "key", "value"))
            mask, scale = given.get("attn_mask"), given.get("scale")
            options = {"a mask of each head": mask} if mask is not None and mask.shape[1] != 1 else {}
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            kept = query, key, value, mask, scale, None, None, options, output.transpose(1, 2).clone()
            found.append(Heard(self.running[-1][0], *kept))
        return output


@contextmanager
def hearing(model: nn.Module) -> Iterator[None]:
    """Let the attention of `model`, a copy, be heard for the length of the block."""
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    inner = [value for config in configs.values() for value in vars(config).values() if _ATTRIBUTE in _space(value)]
    before = [(config, vars(config).get(_ATTRIBUTE)) for config in (*configs.values(), *inner)]
    try:
        for config, name in before:
            if name is not None:
                vars(config)[_ATTRIBUTE] = NAME
        yield
    finally:
        for config, name in before:
            if name is not None:
                vars(config)[_ATTRIBUTE] = name


def _space(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})
