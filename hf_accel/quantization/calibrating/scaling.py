"""Activation-aware scaling in front of rounding: what is read strongly is made larger in the weights that are rounded.

Lin et al. 2023 (arXiv:2306.00978). A channel of what products read is divided by s, in the norm or the product that
gives it, and their columns are multiplied by s: the same function, other roundings. For every place
s = x^a / (w^(1 - a) + 1e-4), over the root of its largest times its smallest value, with x the mean magnitude of a
channel, w that of its columns in their groups, and the a of 20 whose rounded weights change the output of the parent
module least on some rows of the text; no scaling is the 21st. Cost: 21 forward passes of attention, of the MLP and of
its last product over `ROWS` rows; memory: what these read for those rows, and a copy of the scaled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.model.blocks import DecoderBlock
from hf_accel.ops.affine import dequantize, quantize
from hf_accel.ops.tolerances import of_text_logits
from hf_accel.quantization.calibrating.activations import Activations
from hf_accel.quantization.calibrating.layers import Layer, first_of
from hf_accel.quantization.calibrating.places import Place, places_of
from hf_accel.quantization.calibrating.products import Product
from hf_accel.quantization.calibrating.refining import put_weights
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.observing import Moment
from hf_accel.quantization.patcher import scale_dtype

ROWS = 8  # of the text, on which the errors of scales are compared
STEPS = 20  # values of the exponent in [0, 1)
_LEAST = 1e-4


@dataclass
class Scaled:
    """How the layer was scaled.

    columns [K], rows [N]: by what the columns of a product, by path, were multiplied and its rows divided; values: path
    of a parameter that is not rounded -> what it is now; alphas: of each place in order, None: not scaled; reasons: why
    places were left.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    alphas: list[float | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def moments(self, moments: dict[str, Moment]) -> dict[str, Moment]:
        """Return the second moments of what the scaled layer's products read; those that are shared stay so."""
        made: dict[tuple[int, int], Moment] = {}
        found = dict(moments)
        for path, scales in self.columns.items():
            if (moment := moments.get(path)) is not None:
                key = id(moment), id(scales)
                if key not in made:
                    by = scales.double()
                    made[key] = Moment(moment.total / by / by[:, None], moment.count)
                found[path] = made[key]
        return found

    def of(self, path: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return by what columns and rows of a product with this weight [N, K] were scaled, None if by nothing."""
        columns, rows = self.columns.get(path), self.rows.get(path)
        if columns is None and rows is None:
            return None
        n, k = weight.shape
        return (
            torch.ones(k, device=weight.device) if columns is None else columns,
            torch.ones(n, device=weight.device) if rows is None else rows,
        )


def notes_on_scaling(layers: Sequence[Scaled]) -> list[str]:
    """Return sentences on what was scaled in some layers, and what was left."""
    alphas = [alpha for layer in layers for alpha in layer.alphas]
    if not layers:
        return []
    used = [alpha for alpha in alphas if alpha is not None]
    mean = f", exponents {sum(used) / len(used):.2f} on average" if used else ""
    found = [f"scaled by what is read: {len(used)} of {len(alphas)} places{mean}"]
    for reason in dict.fromkeys(reason for layer in layers for reason in layer.reasons):
        found.append(f"not scaled {reason}: {sum(layer.reasons.count(reason) for layer in layers)} places")
    return found


def scale(
    layer: Layer,
    block: DecoderBlock,
    products: Sequence[Product],
    read: Activations,
    model: Any,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> Scaled:
    """Scale a layer of the copied model, whose tensors are replaced and not written to, and return how.

    read: what the layer reads. A layer that gives something else when it is scaled is put back.
    """
    places, reasons = places_of(block, products, model)
    found = Scaled(reasons=reasons)
    if not places:
        return found
    rows = torch.linspace(0, len(read) - 1, min(ROWS, len(read))).round().long().tolist()
    calls = _recorded(layer, places, [read.row(row) for row in rows])
    paths = {id(module): path for path, module in model.named_modules()}
    chosen: list[tuple[Place, Tensor]] = []
    for place in places:
        alpha, scales = _best(place, calls[id(place.parent)], dtype)
        found.alphas.append(alpha)
        advance()
        if scales is not None:
            chosen.append((place, scales))
    before = layer.run(read.row(rows[0]))
    kept = [
        (module, name, parameter)
        for place in places
        for module in (place.source, *(product.module for product in place.readers))
        for name, parameter in module._parameters.items()
    ]
    for place, scales in chosen:
        _fold(place, scales, found, paths)
    after = layer.run(read.row(rows[0]))
    if not float((after - before).norm()) <= of_text_logits(before.dtype) * float(before.norm()):
        for module, name, parameter in kept:
            module._parameters[name] = parameter
        return Scaled(alphas=[None] * len(places), reasons=["where it computes something else when it is scaled"])
    return found


def candidates(inputs: Tensor, weights: Sequence[tuple[Tensor, int]]) -> Iterator[tuple[float, Tensor]]:
    """Yield exponents and the scales fp32 [K] they give.

    inputs [K]: mean magnitudes of what is read; weights: [N, K] each, with the columns that share a scale.
    """
    relative = []
    for weight, group in weights:
        grouped = weight.float().abs().reshape(len(weight), -1, group)
        relative.append((grouped / (grouped.amax(dim=-1, keepdim=True) + 1e-6)).reshape(weight.shape))
    mean = torch.cat(relative).mean(dim=0)
    for step in range(STEPS):
        alpha = step / STEPS
        scales = (inputs.pow(alpha) / (mean.pow(1 - alpha) + 1e-4)).clamp_(min=_LEAST)
        scales = scales / (scales.max() * scales.min()).sqrt()
        yield alpha, torch.where(scales.isfinite(), scales, torch.ones_like(scales))


def _best(place: Place, calls: list[_Call], dtype: torch.dtype) -> tuple[float | None, Tensor | None]:
    """Return the exponent and the scales [K] of least error; None, None where no scales help."""
    magnitudes = torch.cat([call.inputs.flatten(0, -2) for call in calls]).float().abs().mean(dim=0)
    weights = [(product.weight, product.scheme.columns_per_scale(product.weight.shape[1])) for product in place.readers]
    originals = [product.module._parameters["weight"] for product in place.readers]
    best: tuple[float | None, Tensor | None] = None, None
    try:
        least = _error(place, weights, None, calls, dtype)
        for alpha, scales in candidates(magnitudes, weights):
            if place.rows is None:
                _, scales = place.divided(scales)
            error = _error(place, weights, scales, calls, dtype)
            if error < least:
                best, least = (alpha, scales), error
    finally:
        for product, original in zip(place.readers, originals, strict=True):
            product.module._parameters["weight"] = original
    return best


def _error(
    place: Place, weights: list[tuple[Tensor, int]], scales: Tensor | None, calls: list[_Call], dtype: torch.dtype
) -> float:
    """Return the squared error of the parent's output with rounded weights."""
    put = []
    for product, (weight, _) in zip(place.readers, weights, strict=True):
        scaled = weight.float() if scales is None else weight.float() * scales
        rounded = dequantize(quantize(scaled, product.scheme, scale_dtype(product.scheme, dtype)))
        put.append((product, rounded if scales is None else rounded / scales))
    put_weights(put)
    return sum(
        float((first_of(place.parent(*call.args, **call.kwargs)) - call.outputs).float().square().sum())
        for call in calls
    )


def _fold(place: Place, scales: Tensor, found: Scaled, paths: dict[int, str]) -> None:
    if place.rows is None:
        new, scales = place.divided(scales)
        place.source._parameters["weight"] = nn.Parameter(new, requires_grad=False)
        found.values[f"{paths[id(place.source)]}.weight"] = new
    else:
        weight = linear_weight(place.source).detach()
        by = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
        by[place.rows] = scales
        path = paths[id(place.source)]
        found.rows[path] = by * found.rows.get(path, 1.0)
        divided = (weight.float() / by[:, None]).to(weight.dtype)
        divided = divided if isinstance(place.source, nn.Linear) else divided.T.contiguous()  # a Conv1D
        place.source._parameters["weight"] = nn.Parameter(divided, requires_grad=False)
        if (bias := place.source._parameters.get("bias")) is not None:
            new = (bias.detach().float() / by).to(bias.dtype)
            place.source._parameters["bias"] = nn.Parameter(new, requires_grad=False)
            found.values[f"{path}.bias"] = new
    for product in place.readers:
        found.columns[product.path] = scales
    put_weights([(product, product.weight.float() * scales) for product in place.readers])


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Tensor
    outputs: Any = None


def _recorded(layer: Layer, places: Sequence[Place], rows: Sequence[Tensor]) -> dict[int, list[_Call]]:
    """Return how the parents of places, by identity, are called when the layer reads rows [1, T, E]."""
    calls: dict[int, list[_Call]] = {id(place.parent): [] for place in places}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        calls[id(module)].append(_Call(args, kwargs, inputs))

    def after(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        calls[id(module)][-1].outputs = first_of(outputs)

    hooks: list[Any] = []
    try:
        for place in places:
            hooks.append(place.parent.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(place.parent.register_forward_hook(after))
        for row in rows:
            layer.run(row)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
