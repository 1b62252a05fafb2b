"""Which products of a model are quantized, in which scheme, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_accel.core.model.anatomy import Anatomy, holds_experts
from hf_accel.kernels.weights import LANES
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.config import ProductsConfig
from hf_accel.quantization.modules.experts import has_known_layout
from hf_accel.quantization.modules.linear import linear_weight


@dataclass
class Target:
    """A module to quantize: the child `name` of `parent`, called `path` in the model.

    scheme: of a product; None for a module of experts, each of whose products has a scheme of its own.
    """

    path: str
    parent: nn.Module
    name: str
    scheme: Scheme | None = None

    @property
    def module(self) -> Any:
        return self.parent._modules[self.name]


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
            if has_known_layout(module):
                found.append(Target(path, parent, name))
            else:
                skipped.setdefault("experts in a layout that is not known stay as they are", []).append(path)
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
