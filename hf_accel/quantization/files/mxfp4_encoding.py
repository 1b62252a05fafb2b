"""Writing packed experts in MXFP4 as published gpt-oss checkpoints have them, so that other programs open them.

Cost: a copy of one layer's experts at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import UnsupportedModelError
from hf_accel.ops import fp4
from hf_accel.quantization.files.inventory import Inventory
from hf_accel.quantization.files.mxfp4 import MXFP4, SCHEME
from hf_accel.quantization.files.rebuilding import obstacle_to_stock, saved_and_read, skeleton
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts


class Mxfp4Encoding:
    """Writes the experts of a model of which there is an inventory; nothing else of it may be packed.

    packed: the names of modules of experts; plain: name -> tensor stored as it is.

    Raises:
        UnsupportedModelError: the format cannot hold the model.
    """

    def __init__(self, model: Any, found: Inventory) -> None:
        self.ignore = found.ignore
        self.experts = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
        self.packed = list(self.experts)
        inside = tuple(f"{name}." for name in self.packed)
        self.plain = {name: tensor for name, tensor in found.plain.items() if not name.startswith(inside)}
        if reason := self._misfit(found):
            raise UnsupportedModelError(
                f"This {type(model).__name__} cannot be saved in the format {MXFP4!r}: {reason}. Save with format=None."
            )

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return name -> content of files to write beside the config."""
        return {}

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config` that describes the weights."""
        return {"quant_method": MXFP4, "modules_to_not_convert": self.ignore}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return full name -> tensor of the experts called `name`, made on the spot."""
        module = self.experts[name]
        found: dict[str, Tensor] = {}
        for part in PRODUCTS:
            products = list(getattr(module, part))
            by_turns = part == "gate_up_proj" and not module.is_concatenated
            blocks, scales = zip(*(product.packed.to_mxfp4() for product in products), strict=True)
            stacked = {"blocks": _stacked(blocks, by_turns).unflatten(-1, (-1, fp4.GROUP // 2))}
            stacked["scales"] = _stacked(scales, by_turns)
            if module.has_bias:
                stacked["bias"] = _stacked([product.bias.detach() for product in products], by_turns)
            found |= {f"{name}.{part}_{kind}": tensor for kind, tensor in stacked.items()}
        return found

    def sizes(self, name: str) -> dict[str, int]:
        """Return suffix -> bytes of the tensors of the experts called `name`."""
        module = self.experts[name]
        found: dict[str, int] = {}
        for part in PRODUCTS:
            products = getattr(module, part)
            rows, columns = products[0].packed.shape
            values = len(products) * rows * columns
            found |= {f"{part}_blocks": values // 2, f"{part}_scales": values // fp4.GROUP}
            if module.has_bias:
                found[f"{part}_bias"] = len(products) * rows * products[0].bias.element_size()
        return found

    def _misfit(self, found: Inventory) -> str:
        inside = tuple(f"{name}." for name in self.packed)
        for name, weight in found.packed.items():
            if not name.startswith(inside):
                return f"{name} is packed, and only experts are there"
            if weight.scheme != SCHEME:
                return f"{name} is in {weight.scheme.bits} bits of whole numbers"
        if found.shared:
            return f"{min(found.shared)} is packed, and only experts are there"
        for name, module in self.experts.items():
            if not module.is_transposed:  # so does every loader of this format take them
                return f"{name} is of an architecture that has its experts in another layout than gpt-oss"
        return obstacle_to_stock(skeleton(saved_and_read(found.saved_config)), (), self.plain)


def _stacked(parts: Any, by_turns: bool) -> Tensor:
    """Return rows of all experts [experts, rows, ...], those of gate and up by turns where asked."""
    stacked = torch.stack(list(parts))
    return torch.stack(stacked.chunk(2, dim=1), dim=2).flatten(1, 2) if by_turns else stacked
