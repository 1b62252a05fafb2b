"""The anatomy of a model: where its parts are.

It describes and holds nothing of what is done to the model. A decoder layer is described only for the architectures in
`architectures.STYLES`; patchers check by running that a description holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_accel.core.model.architectures import SIBLING_NAMES
from hf_accel.core.model.blocks import DecoderBlock, described_blocks
from hf_accel.core.model.experts import RoutedExperts, active_experts
from hf_accel.core.model.support import check_supported, unwrap
from hf_accel.kernels.weights import PackedProduct


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
    blocks: list[DecoderBlock] = field(default_factory=list)
    blocks_missing: str = ""  # why none is described
    odd_layers: tuple[str, ...] = ()  # sentences on layers that are not as described, beside those that are

    @staticmethod
    def of(model: Any) -> Anatomy:
        """Describe `model`, looking through PEFT wrappers and pipelines.

        Raises:
            UnsupportedModelError: it cannot generate text token by token, is split over devices or not in memory.
        """
        unwrapped = unwrap(model)
        check_supported(unwrapped)
        parameter = next(unwrapped.parameters())
        anatomy = Anatomy(unwrapped, parameter.device, unwrapped.dtype)
        anatomy.blocks, anatomy.odd_layers, anatomy.blocks_missing = described_blocks(unwrapped)
        return anatomy

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
