"""What training did to codes: how many changed since the start, and how many cannot follow their weights any more."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hf_accel.errors import UnsupportedModelError
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear

_WORST = 3  # products that are named


@dataclass(frozen=True)
class Learned:
    """Shares of one product's weights, and the median factor on its scales.

    changed: whose code is another one than at the start. clipped: beyond the outermost codes by more than half a step.
    outermost: whose code is the lowest or the highest one.
    """

    weights: int
    changed: float
    clipped: float
    outermost: float
    scale_factor: float

    @classmethod
    def of(cls, module: FakeQuantizedLinear) -> Learned:
        """Return what training did to a product so far."""
        found = module.affine()
        codes, scheme = found.codes, found.scheme
        return cls(
            weights=codes.numel(),
            changed=float((codes != module.start_codes).float().mean()),
            clipped=float(module.clipped().float().mean()),
            outermost=float(((codes == scheme.lowest) | (codes == scheme.highest)).float().mean()),
            scale_factor=float((module.scales / module.start_scales).median()),
        )


@dataclass
class LearnedCodes:
    """A section of the report: products by path. While `modules` are in training they are looked at when asked."""

    modules: Mapping[str, FakeQuantizedLinear]
    kept: Mapping[str, Learned]

    @classmethod
    def of(cls, modules: Mapping[str, FakeQuantizedLinear]) -> LearnedCodes:
        return cls(modules, {})

    @property
    def products(self) -> dict[str, Learned]:
        """Return what training did to each product, by its path."""
        return dict(self.kept) or {path: Learned.of(module) for path, module in self.modules.items()}

    def fixed(self) -> LearnedCodes:
        """Return the same with what is so now, holding no module."""
        return LearnedCodes({}, self.products)

    def share(self, name: str) -> float:
        """Return the share "changed", "clipped" or "outermost" over all weights."""
        return _mean(self.products, name)

    def to_dict(self) -> dict[str, Any]:
        found = self.products
        totals = {name: _mean(found, name) for name in ("changed", "clipped", "outermost")}
        return totals | {"products": {path: asdict(learned) for path, learned in found.items()}}

    def __str__(self) -> str:
        found = self.products
        changed, clipped, outermost = (100 * _mean(found, name) for name in ("changed", "clipped", "outermost"))
        worst = sorted(found, key=lambda path: -found[path].clipped)[:_WORST]
        factor = statistics.median(learned.scale_factor for learned in found.values())
        text = (
            f"{changed:.2f} % of codes changed since the start, {clipped:.2f} % of weights clipped, "
            f"{outermost:.1f} % at the outermost codes, scales times {factor:.3f} (median)"
        )
        if clipped:
            text += "\nmost clipped: " + ", ".join(f"{path} {100 * found[path].clipped:.2f} %" for path in worst)
        return text


def _mean(products: Mapping[str, Learned], name: str) -> float:
    total = sum(learned.weights for learned in products.values())
    return sum(getattr(learned, name) * learned.weights for learned in products.values()) / max(1, total)


def trained_products(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, FakeQuantizedLinear]]:
    """Yield path, parent, name and module of every product that is in training."""
    for parent_path, parent in model.named_modules():
        for name, module in parent._modules.items():
            if isinstance(module, FakeQuantizedLinear):
                yield (f"{parent_path}.{name}" if parent_path else name), parent, name, module


def check_product(path: str, module: FakeQuantizedLinear) -> None:
    """Raise UnsupportedModelError unless weights and scales of a product are numbers, and no scale is 0."""
    scales = module.scales
    if not bool(module.weight.isfinite().all() and scales.isfinite().all() and (scales != 0).all()):
        raise UnsupportedModelError(
            f"{path} holds weights that are NaN or infinite, or scales that are, or are 0: training diverged. Go back "
            "to a checkpoint, or train anew with a lower learning rate."
        )
