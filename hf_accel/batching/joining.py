"""Which calls can become rows of a batch beside others, and why others cannot."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from hf_accel.batching.merged import Part
from hf_accel.core.calls.call import Call
from hf_accel.core.calls.forward import understood_inputs
from hf_accel.core.calls.rows import apart_obstacle
from hf_accel.core.drift import CACHE
from hf_accel.core.model.back_ends import BACK_ENDS


def joining_obstacle(call: Call) -> str | None:
    """Return why a call whose tokens come one at a time runs beside the batch, None if it may become rows of it."""
    model, kwargs = call.model, call.model_kwargs
    if model.training or torch.is_grad_enabled():
        return "the model is in training mode, or gradients are recorded"
    if torch.is_autocast_enabled(call.input_ids.device.type):
        return "autocast is on"
    cache = kwargs.get(CACHE)
    if cache is None or not kwargs.get("use_cache") or getattr(cache, "offloading", True):
        return "there is no cache, or it is moved between devices by transformers"
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return "the cache has layers whose states are not keys and values that grow"
    if (positions := kwargs.get("position_ids")) is None or positions.dim() != 2:
        return "the model takes no positions by row"
    if others := sorted(name for name in set(kwargs) - understood_inputs(model) if kwargs[name] is not None):
        return f"the model is given {', '.join(others)}, too"
    if call.rope is not None:
        return f"{call.rope}: frequencies follow the longest row"
    if reason := apart_obstacle(model):
        return reason
    name = model.config._attn_implementation
    if (back_end := BACK_ENDS.get(name)) is None or not back_end.reads_held:
        return f"its attention is {name}, which reads one cache at a time"
    if any(hooks_of(model)):
        return "modules of the model are hooked, and hooks are to see the call alone"
    mask = kwargs.get("attention_mask")
    if mask is not None and starts_of(mask) is None:
        return "its mask is more than padding on the left"
    return None


def hooks_of(model: Any) -> list[Any]:
    """Return the dictionaries of forward hooks of all modules of a model, empty where a module has none."""
    return [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def starts_of(mask: torch.Tensor) -> list[int] | None:
    """Return the first column of each row that a mask [B, S] shows, None where it hides others than those before."""
    if mask.dim() != 2:
        return None
    shown = mask.bool()
    counts, width = shown.sum(dim=1), shown.shape[1]
    starts = width - counts
    if bool((counts == 0).any()) or not bool(
        (shown == (torch.arange(width, device=mask.device) >= starts[:, None])).all()
    ):
        return None
    found: list[int] = starts.tolist()
    return found


def part_of(call: Call) -> Part:
    """Return the rows of a call that may join."""
    mask = call.model_kwargs.get("attention_mask")
    starts = None if mask is None else starts_of(mask)
    padded = starts if starts and any(starts) else None
    return Part(call.model_kwargs[CACHE], len(call.input_ids), padded, understood_inputs(call.model))


def follow_rows(part: Part, inputs: dict[str, Any]) -> bool:
    """Let a part have the rows that are left, where others have ended and left; return whether any have."""
    ids = inputs.get("input_ids")
    if ids is None or inputs.get(CACHE) is not part.cache or (rows := len(ids)) >= part.rows:
        return False
    mask = inputs.get("attention_mask")
    starts = None if mask is None else starts_of(mask)
    part.rows, part.starts = rows, starts if starts and any(starts) else None
    return True


def fits(part: Part, inputs: dict[str, Any]) -> bool:
    """Return whether the inputs of a pass are those of one token for each row, and nothing else is asked for."""
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    return (
        ids is not None
        and ids.shape == (part.rows, 1)
        and positions is not None
        and positions.shape == (part.rows, 1)
        and inputs.get(CACHE) is part.cache
        and inputs.get("use_cache") is True
        and not any(name not in part.understood and value is not None for name, value in inputs.items())
    )
