"""Audits a replacement of decoder layers: each layer's own forward is recorded and compared with the replacement.

One forward pass of two short rows, the first left-padded, so that masks, positions and grouped heads all matter; where
the replacement is to serve prompts, a second one of two prompts, which the native library computes in other ways and in
more than one pass. They are made on a copy that shares the tensors, where neither hooks of the user's nor other threads
are met.
Cost: one or two small prefills and the replacement of them, no memory beyond the recorded activations.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_accel.core.calls.cache_layers import Reserved
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.blocks import DecoderBlock
from hf_accel.core.model.discovery.listening import bound, decoder_of, positions_apart
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import VerificationError

TOKENS = 4
PROMPT_TOKENS = 67
AUDITED = "audited as a decoder layer"
Replacement = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor | None]


@dataclass
class RecordedLayer:
    """What one layer was given and returned: hidden states [2, T, E] and the keyword arguments.

    layer: the layer itself, on the copy of the model.
    """

    block: DecoderBlock
    layer: Any
    given: torch.Tensor
    kwargs: dict[str, Any]
    returned: torch.Tensor

    def difference(self, replacement: Replacement, cache: Any) -> float:
        """Return the relative difference (Frobenius) over the tokens that are not padding; infinite if refused.

        cache: an empty one, which the replacement writes into.
        """
        output = self.replaced(replacement, self.given, self.kwargs, cache)
        if output is None:
            return float("inf")
        valid = torch.ones(self.given.shape[:2], dtype=torch.bool)
        valid[0, 0] = False
        expected, found = self.returned[valid].double(), output[valid].double()
        return float((found - expected).norm() / expected.norm())

    def replaced(
        self, replacement: Replacement, hidden: torch.Tensor, kwargs: dict[str, Any], cache: Any = None
    ) -> torch.Tensor | None:
        """Return what the replacement makes of hidden states [B, T, E] over an empty cache, None: one of its own."""
        with torch.no_grad():
            return replacement(hidden, kwargs | {self.block.form.call.cache: cache or _ProbeCache(self.block.index)})

    def prompts(self, batch: int, tokens: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return hidden states [batch, tokens, E] and keyword arguments of prompts without padding, to time them."""
        length = self.given.shape[1]

        def longer(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(longer, value))
            if not isinstance(value, torch.Tensor) or value.dim() < 2:
                return value
            at = 2 if value.dim() == 4 else 1  # angles by axis are [A, B, T, R]
            if value.shape[at] != length:
                return value
            times = [-(-tokens // length) if i == at else 1 for i in range(value.dim())]
            return value.narrow(at - 1, 0, 1).repeat(times).narrow(at, 0, tokens).contiguous()

        call = self.block.form.call
        kwargs = {name: longer(value) for name, value in self.kwargs.items() if name not in (call.cache, call.mask)}
        return longer(self.given).repeat(batch, 1, 1), kwargs | {call.mask: None}


class Audit:
    """Compares replacements of layers with their own forward; what was compared is remembered in the setting.

    config: the name of the config that replaces them. probe: makes the empty cache that the replacement of a layer
        writes so many tokens into; None: one of main memory.
    """

    def __init__(self, setting: Setting, config: str, probe: Callable[[DecoderBlock, int], Any] | None = None) -> None:
        self.setting, self.config, self.probe = setting, config, probe or (lambda block, tokens: None)
        self.records: dict[int, dict[int, RecordedLayer]] = {}

    def recorded(self, block: DecoderBlock, tokens: int = TOKENS) -> RecordedLayer:
        """Return the record of a layer in a pass of so many tokens, which is made once for all of them."""
        if tokens not in self.records:
            self.records[tokens] = record(self.setting.anatomy, tokens)
        if block.index not in self.records[tokens]:
            raise VerificationError(f"Layer {block.index} was not reached by a forward pass of the decoder.")
        return self.records[tokens][block.index]

    def check(self, block: DecoderBlock, replacement: Replacement, bound: float, tokens: int = TOKENS) -> None:
        """Raise VerificationError if a replacement gives another result than the layer's own forward."""
        kept, parts = self.setting.prepared_for(block.layer), _parts(block)
        if _is_same(kept.get((AUDITED, tokens)), parts):
            return  # a copy with the same weights
        difference = self.recorded(block, tokens).difference(replacement, self.probe(block, tokens))
        if not difference <= bound:
            raise VerificationError(
                f"Layer {block.index} ({type(block.layer).__name__}) differs from its own forward by "
                f"{difference:.1e} when run by kernels of hf_accel; rounding explains {bound:.0e}. "
                f"It was not replaced. Leave {self.config} out for this model."
            )
        # weak references, so that tensors which the model no longer has can be freed
        kept[AUDITED, tokens] = [(name, [*map(weakref.ref, tensors)]) for name, tensors in parts]


def _parts(block: DecoderBlock) -> list[tuple[str, list[torch.Tensor]]]:
    """Return class and tensors of every module of a layer: copies that share these compute the same."""
    return [
        (type(module).__qualname__, [*module.parameters(recurse=False), *module.buffers(recurse=False)])
        for module in (block.layer, *block.modules)
    ]


def _is_same(kept: Any, parts: list[tuple[str, list[torch.Tensor]]]) -> bool:
    if kept is None or [name for name, _ in kept] != [name for name, _ in parts]:
        return False
    before = [reference() for _, references in kept for reference in references]
    now = [tensor for _, tensors in parts for tensor in tensors]
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def record(anatomy: Anatomy, length: int = TOKENS) -> dict[int, RecordedLayer]:
    """Run the decoder once on two rows of random tokens; return each described layer's record by its index."""
    records: dict[int, RecordedLayer] = {}
    model = twin(anatomy.model)
    thread = threading.get_ident()

    def keep(block: DecoderBlock, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != thread:  # another thread generates meanwhile
            return
        rest = bound(type(module), args, kwargs)
        given = rest.pop(block.form.call.hidden)
        returned = output[0] if block.form.call.length else output
        records[block.index] = RecordedLayer(block, module, given.clone(), rest, returned.clone())

    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0)).to(anatomy.device)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": True}
    axes = max((len(set(block.form.angles.axes or ())) for block in anatomy.blocks), default=0)
    if axes:
        inputs["position_ids"] = positions_apart(axes, length).to(anatomy.device)
    hooks = [
        model.get_submodule(block.path).register_forward_hook(partial(keep, block), with_kwargs=True)
        for block in anatomy.blocks
    ]
    try:
        with torch.no_grad():
            decoder_of(model)(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return records


class _ProbeLayer:
    """An empty cache layer that a kernel writes into."""

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Reserved:
        shape = (batch, kv_heads, tokens, head_dim)
        return Reserved(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype), 0, 0, None)

    def commit(self, tokens: int) -> None:
        """Nothing follows."""


class _ProbeCache:
    offloading = False
    layer_class_to_replicate = None

    def __init__(self, index: int) -> None:
        self.layers = [_ProbeLayer() for _ in range(index + 1)]
