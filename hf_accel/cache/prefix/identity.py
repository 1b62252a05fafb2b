"""What keys and values of given tokens depend on, as a digest: weights, adapters, hooks, config, form of the cache.

Cost: about 2 ms to see whether weights have changed; about a second per gigabyte to read them all, once, where other
processes are to find the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from hf_accel.cache.codec import Codec
from hf_accel.cache.probing import LayerShape, autocast_dtype
from hf_accel.core.model.watching import PROCESS, Surroundings, simple_attributes

SAMPLES = 16  # of each tensor, that are looked at at every call
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # of peft's layers


class ModelIdentity:
    """Tells when keys and values that were stored of one model no longer are those it would compute.

    is_lasting: whether digests are to be the same in other processes.
    """

    def __init__(self, codec: Codec, *, is_lasting: bool) -> None:
        self.codec, self.is_lasting = codec, is_lasting
        self._contents: tuple[bytes, bytes] | None = None  # the state that weights were in, and the hash of all of them
        self._surroundings: Surroundings | None = None  # classes and functions that the model ran through last
        self._exchanged = 0  # how often they have changed

    def root(self, model: Any, shapes: list[LayerShape]) -> bytes:
        """Return a digest of all that keys and values of given tokens depend on."""
        functions = self._functions_digest(model)
        state = functions + _weights_digest(model)
        if self.is_lasting:
            if self._contents is None or self._contents[0] != state:
                self._contents = state, _contents_digest(model)
            state = self._contents[1] + _ways_digest(model) + functions
        kept = (self.codec.bits, [(s.kv_heads, s.sizes, str(s.dtypes), s.window) for s in shapes])
        ways = (str(autocast_dtype(model)), str(model.device), str(model.config._attn_implementation))
        return hashlib.sha256(state + _config_bytes(model) + repr((kept, ways)).encode()).digest()

    def _functions_digest(self, model: Any) -> bytes:
        """Return a digest of the classes and functions that the model runs through; empty until one is exchanged."""
        if self._surroundings is None or not self._surroundings.look():
            self._exchanged += self._surroundings is not None
            self._surroundings = Surroundings(model.modules())
        return repr((self._exchanged, PROCESS)).encode() if self._exchanged else b""


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
