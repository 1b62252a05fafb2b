"""Prompts take over the keys and values of earlier prompts that begin with the same tokens, per tenant.

Before the forward pass over a prompt the longest stored beginning of every row is copied into the cache's layers, and
stock `generate` goes on from there as it does from a cache of the caller's; afterwards the prompt's blocks are stored.
Keys and values depend on everything before them and on nothing after, so blocks are found by a hash chain over tokens
(as in vLLM, Kwon et al. 2023, arXiv:2309.06180, section 4.3); its root stands for tenant, weights and cache format.
Cost: a copy of what is reused and of what is new, and about 2 ms to see whether weights have changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.cache.codec import Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.cache.prefix.identity import ModelIdentity
from hf_accel.cache.prefix.shelf import PrefixBlock
from hf_accel.cache.prefix.store import PrefixStore
from hf_accel.cache.probing import LayerShape, ModelShapes
from hf_accel.core.calls.rollback import recording
from hf_accel.core.drift import CACHE
from hf_accel.core.model.rope import moving_rope
from hf_accel.core.model.support import foreign_inputs

# inputs of the model that do not change what keys and values of given tokens are
PLAIN = {CACHE, "use_cache", "logits_to_keep", "attention_mask", "position_ids"}


class PrefixReuse:
    """Lets the prompts of one model take over keys and values from `store`, where the call's cache has this `codec`."""

    def __init__(self, store: PrefixStore, codec: Codec, shapes: ModelShapes) -> None:
        self.store, self.codec, self.shapes = store, codec, shapes
        self._identity = ModelIdentity(codec, is_lasting=store.files is not None)

    def obstacle(
        self, model: Any, input_ids: torch.Tensor, generation_config: Any, kwargs: dict[str, Any]
    ) -> str | None:
        """Return why this call's prompt is computed as a whole, None if a beginning may be taken over."""
        if reason := foreign_inputs(model):
            return reason
        cache: Any = kwargs.get(CACHE)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if other := sorted(name for name in set(kwargs) - PLAIN if kwargs[name] is not None):
            return f"the prompt is not of tokens alone ({', '.join(other)})"
        layers: list[Any] = cache.layers if type(cache) is DynamicCache else []
        if not layers or {type(layer) for layer in layers} - {GrowingLayer, GrowingSlidingLayer}:
            return "the cache is not one of ours"
        if cache.get_seq_length() or any(layer.codec != self.codec for layer in layers):
            return "the cache holds something already, or in another form"
        if model.training or torch.is_grad_enabled():
            return "the model is being trained"
        if generation_config.output_hidden_states or generation_config.output_attentions:
            return "hidden states or attentions of the whole prompt are asked for"
        if mask is not None:
            if mask.dim() != 2 or mask.shape != input_ids.shape:
                return "the mask is not of the prompt's tokens"
            if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
                return "the mask has holes or padding on the right"
        if positions is not None:
            padding = torch.zeros(len(input_ids)) if mask is None else (mask == 0).sum(1).cpu()
            expected = torch.arange(input_ids.shape[1]) - padding.long()[:, None]
            if positions.shape != expected.shape or bool(((positions.cpu() != expected) & (expected >= 0)).any()):
                return "positions are the caller's own"
        return None

    @contextmanager
    def reusing(
        self, model: Any, cache: Any, input_ids: torch.Tensor, mask: torch.Tensor | None, tenant: str | None
    ) -> Iterator[None]:
        """Take over what is stored of the prompts' beginnings, and store them after the block."""
        shapes = self.shapes.of(model)
        root = self._identity.root(model, shapes)
        padding = [0] * len(input_ids) if mask is None else (mask == 0).sum(1).tolist()
        rows = [row[pad:] for row, pad in zip(input_ids.tolist(), padding, strict=True)]
        found = [self.store.match(tenant, root, row) for row in rows]
        size = self.store.block_tokens
        # all rows of a cache have as many columns; the last token has to be computed, for what it says comes next
        columns = min(pad + size * len(blocks) for pad, blocks in zip(padding, found, strict=True))
        columns = min(columns, input_ids.shape[1] - 1)
        windows = [x for x in cache.layers if isinstance(x, GrowingSlidingLayer) and not x.record_past]
        with recording(cache) if windows else nullcontext():
            if columns > max(padding):
                self._restore(cache, shapes, found, padding, columns, model.device)
                self.store.count_reused(tenant, sum(columns - pad for pad in padding))
            yield
            for b, row in enumerate(rows):
                if len(row) >= size:
                    self.store.add(tenant, root, row, partial(_cut, cache, b, padding[b]))

    def _restore(
        self,
        cache: Any,
        shapes: list[LayerShape],
        found: list[list[PrefixBlock]],
        padding: list[int],
        columns: int,
        device: torch.device,
    ) -> None:
        for index, (layer, shape) in enumerate(zip(cache.layers, shapes, strict=True)):
            buffers = []
            for part in (0, 1):
                size = (len(found), shape.kv_heads, columns, self.codec.row(shape.sizes[part]))
                buffer = torch.zeros(size, dtype=self.codec.kept_dtype(shape.dtypes[part]), device=device)
                for b, blocks in enumerate(found):
                    at = padding[b]
                    for block in blocks:
                        states = block.tensors[2 * index + part][:, : columns - at]
                        buffer[b, :, at : at + states.shape[1]] = states
                        at += states.shape[1]
                        if at >= columns:
                            break
                buffers.append(buffer)
            layer.adopt(buffers[0], buffers[1], shape.sizes, shape.dtypes)


def prefix_obstacle(model: Any) -> str | None:
    """Return why no prompt of this model can take over keys and values, None if they can."""
    # another prompt of another length would have written other keys
    rope = moving_rope(model)
    return None if rope is None else str(rope)


def _cut(cache: Any, row: int, padding: int, start: int, stop: int) -> list[torch.Tensor]:
    """Return keys and values [G, n, R] of positions [start, stop) of a row, of every layer in turn."""
    found = []
    for layer in cache.layers:
        for buffer in (layer.buffers.keys, layer.buffers.values):
            found.append(buffer[row, :, padding + start : padding + stop])
    return found
