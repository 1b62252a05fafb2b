"""What a module of packed experts computes: products in few bits instead of slices of 3-D parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_accel.core.model.experts import ExpertsForm, gate_of
from hf_accel.kernels.weights import PackedProduct


def packed_products(module: nn.Module) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """Return the products gate_up [2 I, E] and down [E, I] of every expert; None where `module` holds no such.

    Each has `packed`, a `PackedWeight`, and `bias`, a tensor or None.
    """
    both = [module._modules.get(name) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(part, nn.ModuleList) and len(part) for part in both):
        return None
    gate_up, down = ([*part] for part in both)  # type: ignore[misc]
    if len(gate_up) != len(down) or not all(isinstance(product, PackedProduct) for product in [*gate_up, *down]):
        return None
    return gate_up, down


def described_packed(module: Any) -> ExpertsForm:
    """Return what a module with `packed_products` computes: their rows have gate above up, whatever its class has.

    Raises:
        ValueError: the reason why it cannot be told.
    """
    found = packed_products(module)
    if found is None:
        raise ValueError("they are no packed products")
    gate_up, down = found
    hidden, inner = down[0].packed.shape
    shapes = {product.packed.shape for product in gate_up}, {product.packed.shape for product in down}
    if shapes != ({(2 * inner, hidden)}, {(hidden, inner)}):
        raise ValueError("their packed products are of several sizes")
    gate = gate_of(module, not getattr(module, "is_concatenated", True))
    return ExpertsForm(len(down), hidden, inner, False, False, gate_up[0].bias is not None, gate)
