"""Prompts of a padded batch, read row by row: what is padding is not computed at all, in no layer.

Attention can skip padding, products cannot: a batch of 512, 1,024, 2,048 and 4,096 tokens costs them 16,384. Rows of a
length are read together, each such group by stock's own `_prefill` over a cache of its own; then the call's cache is
given keys and values of all rows, where they would lie: behind their padding. Every row is computed as if alone.
Memory: keys and values of the prompt once more, layer by layer given up. On CPUs, where a few long rows keep all cores
busy as well as many do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.attention.statistics import AttentionStatistics
from hf_accel.core.calls.bands import starts_of
from hf_accel.core.calls.cache_layers import takes_states
from hf_accel.core.drift import CACHE
from hf_accel.core.model.rope import moving_rope

LEAST_TOKENS = 1024  # of a batch: below, native layers serve it whole
LEAST_SAVED = 0.15  # of the tokens
TOKENS_PER_GROUP = 128  # what reading all weights once more costs, in tokens
PLAIN = {CACHE, "use_cache", "logits_to_keep", "attention_mask", "position_ids"}


class PaddedPrompts:
    """Stands at the door of padded prompts of one model."""

    def __init__(self, statistics: AttentionStatistics) -> None:
        self.statistics = statistics

    def read(
        self,
        model: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        kwargs: dict[str, Any],
        run: Callable[[torch.Tensor, dict[str, Any]], Any],
    ) -> Any:
        """Return the outputs of the prompt input_ids [B, S], logits [B, 1, V], or None where rows gain nothing apart.

        run: reads a prompt with the keywords it is given.
        """
        groups = _groups(input_ids, kwargs.get("attention_mask"))
        if groups is None or _obstacle(model, generation_config, kwargs):
            return None
        logits: torch.Tensor | None = None
        parts: list[tuple[torch.Tensor, int, Any]] = []
        for start, rows in groups.items():
            index = torch.tensor(rows)
            own = dict(kwargs) | {CACHE: DynamicCache()}
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    own[name] = kwargs[name][index, start:]
            outputs = run(input_ids[index, start:], own)
            if logits is None:
                logits = outputs.logits.new_empty((len(input_ids), *outputs.logits.shape[1:]))
            logits[index] = outputs.logits
            parts.append((index, start, outputs[CACHE]))
        cache = kwargs[CACHE]
        for number in range(len(parts[0][2].layers)):
            cache.update(*_joined(parts, number, *input_ids.shape), number)
        outputs.logits, outputs[CACHE] = logits, cache
        self.statistics.padded_prompts += 1
        return outputs


def _groups(input_ids: torch.Tensor, mask: torch.Tensor | None) -> dict[int, list[int]] | None:
    """Return the rows by their first column that is no padding; None where a batch as a whole costs no more."""
    batch, tokens = input_ids.shape
    if mask is None or batch < 2 or batch * tokens < LEAST_TOKENS or mask.shape != input_ids.shape:
        return None
    starts = starts_of(mask.bool())
    if starts is None or max(starts) == tokens:
        return None
    groups: dict[int, list[int]] = {}
    for row, start in enumerate(starts):
        groups.setdefault(start, []).append(row)
    saved = sum(starts) - TOKENS_PER_GROUP * (len(groups) - 1)
    return groups if saved >= LEAST_SAVED * batch * tokens else None


def _obstacle(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the call asks for more than tokens can be given apart, or its cache does."""
    cache = kwargs.get(CACHE)
    return (
        model.device.type != "cpu"
        or model.training
        or torch.is_grad_enabled()
        or any(value is not None for name, value in kwargs.items() if name not in PLAIN)
        or kwargs.get("logits_to_keep") != 1
        or generation_config.output_attentions
        or generation_config.output_hidden_states
        or generation_config.prefill_chunk_size is not None
        or type(cache) is not DynamicCache
        or getattr(cache, "offloading", False)
        or not all(map(takes_states, cache.layers))
        or bool(cache.get_seq_length())
        or moving_rope(model) is not None  # rows of another length would have other positions
        or any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )


def _joined(
    parts: list[tuple[torch.Tensor, int, Any]], number: int, batch: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [B, G, S, D] of one layer of all rows, zeros for padding; the parts give theirs up."""
    found = []
    for name in ("keys", "values"):
        joined: torch.Tensor | None = None
        for index, start, cache in parts:
            states = getattr(cache.layers[number], name)
            if joined is None:
                joined = states.new_zeros((batch, states.shape[1], tokens, states.shape[3]))
            joined[index, :, start:] = states
        found.append(joined)
    for _, _, cache in parts:
        cache.layers[number].keys = cache.layers[number].values = None
    return found[0], found[1]  # type: ignore[return-value]
