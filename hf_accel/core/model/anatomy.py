"""The anatomy of a model: where its parts are.

It describes and holds nothing of what is done to the model. Decoder layers are described by what they do when they run
(`core.model.discovery`), once they are asked for; patchers compare what they put in a layer's place with the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_accel.core.model.blocks import DecoderBlock, described_blocks
from hf_accel.core.model.discovery.discovering import Forms
from hf_accel.core.model.experts import RoutedExperts, active_experts
from hf_accel.core.model.support import check_supported, unwrap
from hf_accel.kernels.weights import PackedProduct

SIBLING_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Siblings:
    """Projections of one parent that read the same input: q/k/v, or gate/up."""

    parent: nn.Module
    names: tuple[str, ...]


@dataclass
class Anatomy:
    """A causal language model as the patchers see it."""

    PRODUCTS: ClassVar[tuple[type, ...]] = (nn.Linear, Conv1D)  # exactly these; subclasses compute something else

    model: Any  # a PreTrainedModel; its methods are typed too loosely to be checked
    device: torch.device
    dtype: torch.dtype
    known: Forms = field(default_factory=dict)  # forms of layers, which copies of the model share

    @staticmethod
    def of(model: Any, known: Forms | None = None) -> Anatomy:
        """Describe `model`, looking through PEFT wrappers and pipelines.

        known: forms of layers of a copy of the model.

        Raises:
            UnsupportedModelError: it cannot generate text token by token, is split over devices or not in memory.
        """
        unwrapped = unwrap(model)
        check_supported(unwrapped)
        parameter = next(unwrapped.parameters())
        return Anatomy(unwrapped, parameter.device, unwrapped.dtype, {} if known is None else known)

    @cached_property
    def _layers(self) -> tuple[list[DecoderBlock], tuple[str, ...], str]:
        return described_blocks(self.model, self.known)

    @property
    def blocks(self) -> list[DecoderBlock]:
        """The decoder layers that are understood; the first question runs a copy of the decoder on a few tokens."""
        return self._layers[0]

    @property
    def odd_layers(self) -> tuple[str, ...]:
        """Sentences on layers that are not understood, beside those that are."""
        return self._layers[1]

    @property
    def blocks_missing(self) -> str:
        """Why no layer is understood."""
        return self._layers[2]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and packed weights, tied ones counted once."""
        return self._bytes(self.model.modules())

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a token reads: not a table of embeddings that is not the head's weight, too.

        Of experts only those are counted that a token is sent to.
        """
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        total = self._bytes(self.model.modules())
        own = self._bytes([table])
        both = self._bytes([table, head]) if head is not None else 0
        is_tied = head is not None and both < own + self._bytes([head])
        total -= self._idle_bytes()
        return total if is_tied or head is None else total - own

    def _idle_bytes(self) -> int:
        """Bytes of the experts that a token is not sent to; 0 where the model does not say to how many it is."""
        active, idle = active_experts(self.model), 0
        for module in self.model.modules():
            if active is not None and (holds_experts(module) or isinstance(module, RoutedExperts)):
                experts = self._bytes(module.modules())
                count: Any = module.num_experts
                idle += experts - experts * min(active, count) // count
        return idle

    @staticmethod
    def _bytes(modules: Any) -> int:
        tensors: dict[int, torch.Tensor] = {}
        for module in modules:
            found = [p for p in module._parameters.values() if p is not None]
            if isinstance(module, PackedProduct) and isinstance(module, nn.Module):
                found += [b for b in module._buffers.values() if b is not None]
            tensors |= {id(tensor): tensor for tensor in found}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def architecture(self) -> str:
        return str(self.model.config.model_type)

    def products(self) -> list[nn.Module]:
        """Modules that are exactly `nn.Linear` or GPT-2's `Conv1D`."""
        return [module for module in self.model.modules() if type(module) in self.PRODUCTS]

    def siblings(self) -> list[Siblings]:
        """Groups of plain `nn.Linear` without adapters that read one input."""
        found = []
        for parent in self.model.modules():
            for names in SIBLING_NAMES:
                children = [parent._modules.get(name) for name in names]
                if all(type(child) is nn.Linear for child in children):
                    found.append(Siblings(parent, names))
        return found


def is_packed(model: nn.Module) -> bool:
    """Return whether weights of the model are packed: its products round what they read, too."""
    return any(isinstance(module, PackedProduct) for module in model.modules())


def holds_experts(module: nn.Module) -> bool:
    """Return whether `module` holds the weights of several experts in 3-D parameters, in whatever layout.

    Convolutions and tables of positions have three dimensions, too: a module of experts knows how many it has.
    """
    counts = {getattr(module, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    is_named = "expert" in type(module).__name__.lower()
    return any(p.dim() == 3 and (is_named or p.shape[0] in counts) for p in module.parameters(recurse=False))
