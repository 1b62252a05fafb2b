"""The products of a decoder layer that are rounded, those of its experts included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_accel.ops.affine import Scheme
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.modules.experts import PRODUCTS, SplitExperts, bias_of, weight_of
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
    experts, layout = model.get_submodule(target.path), target.layout
    if not isinstance(experts, SplitExperts):
        gate_up, down = (_linears(experts, layout, name) for name in PRODUCTS)
        experts = SplitExperts(gate_up, down, experts, by_turns=True).train(experts.training)
        parent, _, name = target.path.rpartition(".")
        model.get_submodule(parent)._modules[name] = experts
    modules = (module for name in PRODUCTS for module in getattr(experts, name))
    return [Product(path, next(modules), scheme) for path, _, scheme, _ in target.products(config)]


def widest_of(targets: Sequence[Target]) -> int:
    """Return the inputs of the widest product of some targets; 0 where there are none."""
    return max((weight.shape[-1] for target in targets for weight in target.weights), default=0)


def within(targets: Sequence[Target], path: str) -> list[Target]:
    """Return the targets in the module called `path`."""
    return [target for target in targets if target.path.startswith(f"{path}.")]


def _linears(experts: Any, layout: Any, name: str) -> list[Any]:
    """Return the product `name` of each expert, on its memory, with rows as they lie there."""
    found = []
    for index in range(layout.experts):
        weight, bias = weight_of(experts, layout, name, index), bias_of(experts, layout, name, index)
        linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        found.append(linear)
    return found
