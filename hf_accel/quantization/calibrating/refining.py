"""Codes and scales of one decoder layer are refined together, until its output is that of the original layer.

Solving looks at one product at a time. Here all products of a layer are trained on what the layer gives, and on what
it reads from the rounded layers before it, so that errors are made up for across products and layers. The step is the
sign of the gradient, and rounding is passed straight through, as in SignRound (Cheng et al. 2023, arXiv:2309.05516);
unlike there it starts from solved codes, from which few steps lead further than many from rounding to nearest. Cost:
each step is a forward and a backward pass over `ROWS` rows of the text; memory: the layer's weights in fp32, four
times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.ops.affine import Affine
from hf_accel.ops.gptq import Solved
from hf_accel.quantization.calibrating.activations import Activations
from hf_accel.quantization.calibrating.layers import Layer
from hf_accel.quantization.calibrating.products import Product

ROWS = 2  # of the text, read in one step
_VALUES, _SCALES = 0.27, 0.2  # first step times the number of steps: of values in codes, of scales in themselves
_EDGE = 0.499  # a clipped value starts this far from its code, from where it can still change
_TOLD = 8  # rows by which it is decided whether the layer has got better


@dataclass
class _Trained:
    """One product in training: what its weights are in steps of their scale [N, K], scales and zeros [N, G]."""

    product: Product
    values: Tensor
    scales: Tensor
    start: Affine

    @staticmethod
    def of(product: Product, solved: Solved) -> _Trained:
        affine = solved.affine
        codes = affine.codes.float()
        values = torch.minimum(torch.maximum(solved.values, codes - _EDGE), codes + _EDGE)
        return _Trained(product, values, affine.scales.float(), affine)

    def affine(self) -> Affine:
        scheme = self.start.scheme
        codes = self.values.round().clamp_(scheme.lowest, scheme.highest).to(torch.int8)
        return Affine(codes, self.scales.to(self.start.scales.dtype), self.start.zeros, scheme)

    def steps(self) -> Tensor:
        """Return the codes less their zeros, fp32 [N, G, g]."""
        found = self.affine()
        grouped = found.codes.float().view(*self.scales.shape, -1)
        return grouped if found.zeros is None else grouped - found.zeros[..., None].float()

    def weight(self) -> Tensor:
        """Return the weight [N, K] that codes and scales stand for."""
        scales = self.scales.to(self.start.scales.dtype).float()
        return (self.steps() * scales[..., None]).view_as(self.values)

    def move(self, gradient: Tensor, share: float, steps: int) -> None:
        """Go one step against the gradient [N, K] of the weight; `share` of the first one's length."""
        grouped = gradient.float().view(*self.scales.shape, -1)
        by_value = grouped * self.scales[..., None]
        by_scale = (grouped * self.steps()).sum(dim=-1)
        self.values.sub_(by_value.sign().view_as(self.values), alpha=_VALUES * share / steps)
        self.scales.sub_(by_scale.sign() * self.scales.abs(), alpha=_SCALES * share / steps)


@dataclass(frozen=True)
class Refined:
    """A refined layer: what each product was made of, by path, and the squared error of its output, as a share."""

    affines: dict[str, Affine]
    before: float
    after: float


@torch.no_grad()
def refined(
    layer: Layer,
    made: Sequence[tuple[Product, Solved]],
    inputs: Activations,
    outputs: Activations,
    steps: int,
    seed: int,
    advance: Callable[[], None],
) -> Refined:
    """Return better codes and scales for the solved products of a layer, or those they have if there are none.

    inputs: what the layer reads after the rounded ones before it; outputs: what the original gives. The layer, which
    has the original weights, has them again afterwards.
    """
    trained = [_Trained.of(product, solved) for product, solved in made]
    originals = [product.module._parameters["weight"] for product, _ in made]
    generator = torch.Generator().manual_seed(seed)
    try:
        first = {one.product.path: one.start for one in trained}
        before = _error(layer, trained, inputs, outputs)
        for step in range(steps):
            rows = torch.randperm(len(inputs), generator=generator)[:ROWS].tolist()
            weights = _put(trained, requires_grad=True)
            for one, gradient in zip(trained, _gradients(layer, weights, inputs, outputs, rows), strict=True):
                if gradient is not None:
                    is_turned = not isinstance(one.product.module, nn.Linear)
                    one.move(gradient.T if is_turned else gradient, 1 - step / steps, steps)
            advance()
        after = _error(layer, trained, inputs, outputs)
        if not after < before:
            return Refined(first, before, before)
        return Refined({one.product.path: one.affine() for one in trained}, before, after)
    finally:
        for (product, _), original in zip(made, originals, strict=True):
            product.module._parameters["weight"] = original


@torch.enable_grad()
def _gradients(
    layer: Layer, weights: list[nn.Parameter], inputs: Activations, outputs: Activations, rows: list[int]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the squared error on some rows; parameters of the model get none."""
    error = torch.stack([_squared(layer, inputs, outputs, row) for row in rows]).sum()
    return torch.autograd.grad(error, weights, allow_unused=True)


def put_weights(made: Sequence[tuple[Product, Tensor]]) -> None:
    """Give products of a copied model other weights [N, K]; those they had are not written to."""
    for product, weight in made:
        _set(product.module, weight, requires_grad=False)


def _put(trained: Sequence[_Trained], requires_grad: bool) -> list[nn.Parameter]:
    return [_set(one.product.module, one.weight(), requires_grad) for one in trained]


def _set(module: Any, weight: Tensor, requires_grad: bool) -> nn.Parameter:
    weight = weight.to(module._parameters["weight"].dtype)
    laid = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
    parameter = nn.Parameter(laid, requires_grad=requires_grad)
    module._parameters["weight"] = parameter
    return parameter


def _squared(layer: Layer, inputs: Activations, outputs: Activations, row: int) -> Tensor:
    return (layer.run(inputs.row(row)) - outputs.row(row)).float().square().sum()


@torch.no_grad()
def _error(layer: Layer, trained: Sequence[_Trained], inputs: Activations, outputs: Activations) -> float:
    _put(trained, requires_grad=False)
    rows = torch.linspace(0, len(inputs) - 1, min(_TOLD, len(inputs))).round().long().tolist()
    error = sum(float(_squared(layer, inputs, outputs, row)) for row in rows)
    return error / (sum(float(outputs.row(row).float().square().sum()) for row in rows) or 1.0)
