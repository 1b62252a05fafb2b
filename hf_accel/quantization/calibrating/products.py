"""The products of a decoder layer that are rounded, those of its experts included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_accel.ops.affine import Scheme
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.targets import Target


@dataclass(frozen=True)
class Product:
    """A product called `path`; `module`, of the copy of the model that reads the text, has its weight."""

    path: str
    module: nn.Module
    scheme: Scheme

    @property
    def weight(self) -> Tensor:
        """The weight [N, K]."""
        return linear_weight(self.module).detach()


def products_of(model: Any, target: Target, config: WeightOnlyConfig) -> list[Product]:
    """Return what is rounded of `target`, which `model`, a copy, has at the same path.

    Experts in 3-D parameters become products of their own there, on the same memory: their rows are seen only so.
    """
    if target.scheme is not None:
        return [Product(target.path, model.get_submodule(target.path), target.scheme)]
    experts = model.get_submodule(target.path)
    if not isinstance(experts, QuantizedExperts):
        gate_up, down = _linears(experts.gate_up_proj), _linears(experts.down_proj)
        experts = QuantizedExperts(gate_up, down, experts).train(experts.training)
        parent, _, name = target.path.rpartition(".")
        model.get_submodule(parent)._modules[name] = experts
    bits, size = config.bits_of(target.path) or config.bits, config.group_size_of(target.path)
    return [
        Product(f"{target.path}.{name}.{index}", module, config.scheme(bits, module.in_features, size)[0])
        for name in ("gate_up_proj", "down_proj")
        for index, module in enumerate(getattr(experts, name))
    ]


def widest_of(targets: Sequence[Target]) -> int:
    """Return the inputs of the widest product of some targets; 0 where there are none."""
    found = [0]
    for target in targets:
        if target.scheme is not None:
            found.append(linear_weight(target.module).shape[1])
        else:
            found += [weight.shape[-1] for weight in target.module.parameters() if weight.dim() == 3]
    return max(found)


def within(targets: Sequence[Target], path: str) -> list[Target]:
    """Return the targets in the module called `path`."""
    return [target for target in targets if target.path.startswith(f"{path}.")]


def _linears(weights: Tensor) -> list[Any]:
    """Return a product for each weight [N, K] of `weights`, on its memory."""
    found = []
    for weight in weights.detach():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        found.append(linear)
    return found
