"""Which products of a model are quantized, in which scheme, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_accel.core.model.anatomy import Anatomy, holds_experts
from hf_accel.core.model.experts import ExpertsLayout, layout_of
from hf_accel.kernels.weights import LANES
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.config import ProductsConfig
from hf_accel.quantization.modules.experts import PRODUCTS, shape_of
from hf_accel.quantization.modules.linear import linear_weight


@dataclass
class Target:
    """A module to quantize: the child `name` of `parent`, called `path` in the model.

    scheme: of a product; None for a module of experts, each of whose products has a scheme of its own.
    layout: of experts; None for a product.
    """

    path: str
    parent: nn.Module
    name: str
    scheme: Scheme | None = None
    layout: ExpertsLayout | None = None

    @property
    def module(self) -> Any:
        return self.parent._modules[self.name]

    @property
    def weights(self) -> list[Tensor]:
        """The weights: [N, K] of a product, or [experts, N, K] of each product of experts, on their memory."""
        if self.layout is None:
            return [linear_weight(self.module).detach()]
        found = [self.module.gate_up_proj.detach(), self.module.down_proj.detach()]
        return [weight.mT for weight in found] if self.layout.transposed else found

    def products(self, config: ProductsConfig) -> list[tuple[str, tuple[int, int], Scheme, str]]:
        """Return path, rows and columns, scheme, and why it is not the one asked for, of each product of experts."""
        layout, found = self.layout, []
        if layout is not None:
            for name in PRODUCTS:
                rows, columns = shape_of(layout, name)
                for index in range(layout.experts):
                    scheme, reason = config.expert_scheme(self.path, name, index, columns)
                    found.append((f"{self.path}.{name}.{index}", (rows, columns), scheme, reason))
        return found


def targets(anatomy: Anatomy, config: ProductsConfig) -> tuple[list[Target], list[str]]:
    """Return what `config` quantizes in a model, and sentences on what it leaves out."""
    found: list[Target] = []
    skipped: dict[str, list[str]] = {}
    head = anatomy.model.get_output_embeddings()
    for path, parent, name, module in _places(anatomy.model):
        is_product, is_experts = type(module) in anatomy.PRODUCTS, holds_experts(module)
        bits = config.head if module is head and not is_experts else config.bits_of(path)
        if bits is None or not (is_product or is_experts):
            continue
        if is_experts:
            try:
                target = Target(path, parent, name, layout=_layout(module))
            except ValueError as error:
                skipped.setdefault(f"experts stay as they are, for {error}", []).append(path)
                continue
            found.append(target)
            for product, _, _, reason in target.products(config):
                if reason:
                    skipped.setdefault(reason, []).append(product)
            continue
        rows, columns = linear_weight(module).shape
        if rows < LANES:
            skipped.setdefault(f"products of fewer than {LANES} rows stay as they are", []).append(path)
            continue
        scheme, reason = config.scheme(bits, columns, None if module is head else config.group_size_of(path))
        if reason:
            skipped.setdefault(reason, []).append(path)
        found.append(Target(path, parent, name, scheme))
    return found, [f"{reason}: {_listed(paths)}" for reason, paths in skipped.items()]


def _layout(module: Any) -> ExpertsLayout:
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError("they are spread over several processes")
    return layout_of(module)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yield path, parent, name and module of everything in a model that is not part of an adapter."""
    adapters: set[str] = set()
    for parent_path, parent in model.named_modules():
        for name, module in parent._modules.items():
            path = f"{parent_path}.{name}" if parent_path else name
            if module is None:
                continue
            if parent_path in adapters or _is_adapter(parent, name):  # parents come before what they hold
                adapters.add(path)
                continue
            yield path, parent, name, module


def _is_adapter(parent: nn.Module, name: str) -> bool:
    """Return whether a child belongs to an adapter and not to the model: PEFT keeps the model's in `base_layer`."""
    return (hasattr(parent, "base_layer") and name != "base_layer") or name.startswith(("lora_", "modules_to_save"))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
