"""Prompts take over the keys and values of earlier prompts that begin with the same tokens, per tenant.

Before the forward pass over a prompt the longest stored beginning of every row is copied into the cache's layers, and
stock `generate` goes on from there as it does from a cache of the caller's; afterwards the prompt's blocks are stored.
Keys and values depend on everything before them and on nothing after, so blocks are found by a hash chain over tokens
(as in vLLM, Kwon et al. 2023, arXiv:2309.06180, section 4.3); its root stands for tenant, weights and cache format.
Cost: a copy of what is reused and of what is new, and about 2 ms to see whether weights have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.cache.codec import Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.cache.prefix.store import Block, PrefixStore
from hf_accel.cache.probing import LayerShape, ModelShapes, autocast_dtype
from hf_accel.core.calls.forward import recording
from hf_accel.core.drift import CACHE
from hf_accel.core.model.rope import moving_rope
from hf_accel.core.model.support import foreign_inputs
from hf_accel.core.model.watching import PROCESS, Surroundings, simple_attributes

BLOCK_TOKENS = 64
PLAIN = {CACHE, "use_cache", "logits_to_keep", "attention_mask", "position_ids"}
SAMPLES = 16
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # of peft's layers


class Prefixes:
    """The stored beginnings of one model's prompts, in the form that `codec` and the layers' `shapes` give them."""

    def __init__(self, store: PrefixStore, codec: Codec, shapes: ModelShapes) -> None:
        self.store, self.codec, self.shapes = store, codec, shapes
        self._contents: tuple[bytes, bytes] | None = None  # of which weights, their hash
        self._surroundings: Surroundings | None = None
        self._exchanged = 0

    def objection(
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
        root = self._root(model, shapes)
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
        found: list[list[Block]],
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

    def _functions_digest(self, model: Any) -> bytes:
        """Return a digest of the classes and functions that the model runs through; empty until one is exchanged."""
        if self._surroundings is None or not self._surroundings.look():
            self._exchanged += self._surroundings is not None
            self._surroundings = Surroundings(model.modules())
        return repr((self._exchanged, PROCESS)).encode() if self._exchanged else b""

    def _root(self, model: Any, shapes: list[LayerShape]) -> bytes:
        """Return a digest of all that keys and values of given tokens depend on."""
        functions = self._functions_digest(model)
        state = functions + _weights_digest(model)
        if self.store.files is not None:
            if self._contents is None or self._contents[0] != state:
                self._contents = state, _contents_digest(model)
            state = self._contents[1] + _ways_digest(model) + functions
        kept = (self.codec.bits, [(s.kv_heads, s.sizes, str(s.dtypes), s.window) for s in shapes])
        ways = (str(autocast_dtype(model)), str(model.device), str(model.config._attn_implementation))
        return hashlib.sha256(state + _config_bytes(model) + repr((kept, ways)).encode()).digest()


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


def _config_bytes(model: Any) -> bytes:
    return json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode()


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _weights_digest(model: Any) -> bytes:
    """Return a digest that changes when weights, adapters or hooks do: where tensors lie, their versions, samples."""
    digest = hashlib.sha256(_ways_digest(model))
    samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for name, tensor in _tensors(model):
        digest.update(
            repr((name, tensor.data_ptr(), _version(tensor), tensor.shape, tensor.stride(), tensor.dtype)).encode()
        )
        if tensor.numel():
            flat = tensor.detach().flatten() if tensor.is_contiguous() else tensor.detach()[..., :1].flatten()
            samples.setdefault((tensor.dtype, tensor.device), []).append(flat[:: len(flat) // SAMPLES + 1])
    for group in samples.values():
        digest.update(torch.cat(group).cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _ways_digest(model: Any) -> bytes:
    """Return a digest of what modules do with their weights, as far as it can be changed from outside."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        # keys of hooks are counted up and never come again, as addresses do
        hooks = [*module._forward_hooks, *module._forward_pre_hooks]
        adapters = [getattr(module, state, None) for state in ADAPTER_STATE]
        digest.update(repr((name, type(module).__qualname__, simple_attributes(module))).encode())
        if hooks:
            digest.update(repr((hooks, PROCESS)).encode())
        if any(adapter is not None for adapter in adapters):
            digest.update(repr(adapters).encode())
    return digest.digest()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _contents_digest(model: Any) -> bytes:
    """Return a digest of every weight; about a second per gigabyte."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in _tensors(model):
        digest.update(repr((name, tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
