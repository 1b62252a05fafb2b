"""Steps whose decoder layers run as torch.compile made them: one artefact for all layers, which are alike.

Compiled is not the model but each layer of a copy that shares its tensors (regional compilation), with what tells the
layers apart taken from their code: every layer has a cache of its own, which does not ask for its index. Attention is
plain torch over the whole buffers, so that it can be compiled with the rest.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from hf_accel.compilation.slots import Slot
from hf_accel.compilation.step import StaticStep, StepResults
from hf_accel.compilation.step_layers import AskedForLength, StepLayer
from hf_accel.core.model.layer_list import layer_list
from hf_accel.core.model.shadow import shadow
from hf_accel.ops.attention import grouped_attention

NAME = "hfaccel_folded"
BACK_END = "inductor"
MOST_SHAPES = 64  # of rows, tokens and columns, each with kernels of its own


class LayerCache(Cache):
    """The cache as one layer sees it: whatever index it names, it is given its own keys and values."""

    def __init__(self, layer: StepLayer) -> None:
        super().__init__(layers=[])
        self.layer = layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise AskedForLength("its code asks the cache for its length")


class Numberless(nn.Module):
    """A decoder layer of the copy, which is handed a cache of its own in place of the step's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.cache: LayerCache | None = None
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = 0  # type: ignore[assignment]
        layer.compile(fullgraph=True, dynamic=False, backend=BACK_END)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def own(value: Any) -> Any:
            return self.cache if isinstance(value, Cache) else value

        return self.layer(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # the kind of its attention, say


class CompiledSteps:
    """Makes steps of a model, from a copy of its modules that is made once and again after `forget`."""

    def __init__(self) -> None:
        self._copies: weakref.WeakKeyDictionary[Any, tuple[Any, nn.ModuleList]] = weakref.WeakKeyDictionary()

    def __call__(self, model: Any, slot: Slot, tokens: int) -> StaticStep:
        if model not in self._copies:
            self._copies[model] = compiled_copy(model)
        return CompiledStep(*self._copies[model], slot, tokens)

    def forget(self) -> None:
        """Give the copies up: the model is no longer what they are copies of."""
        self._copies.clear()


def compiled_copy(model: Any) -> tuple[Any, nn.ModuleList]:
    """Return a copy of a model that shares its tensors, and its decoder layers, each to be compiled when it is run.

    Raises:
        LookupError: it has no list of decoder layers.
    """
    _register()
    copy = shadow(model)
    for module in copy.modules():
        if (config := vars(module).get("config")) is not None:
            config._attn_implementation = NAME
    _, layers = layer_list(copy)
    for index, layer in enumerate(layers):
        layers[index] = Numberless(layer)
    return copy, layers


class CompiledStep(StaticStep):
    """A step of the compiled copy of a model."""

    def __init__(self, copy: Any, layers: nn.ModuleList, slot: Slot, tokens: int) -> None:
        super().__init__(copy, slot, tokens)
        self._layers = layers

    def run(self) -> StepResults:
        """See `StaticStep.run`; the first run of a shape compiles."""
        layer: Any
        for layer, own in zip(self._layers, self.cache.layers, strict=True):
            own.gives_handles = False
            layer.cache = LayerCache(own)
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            return super().run()


def folded_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention: query [B, H, T, D] -> ([B, T, H, D], None)."""
    return grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


@functools.cache
def _register() -> None:
    """Let transformers find the attention of compiled copies; in no list of ours: models never have it."""
    AttentionInterface.register(NAME, folded_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
