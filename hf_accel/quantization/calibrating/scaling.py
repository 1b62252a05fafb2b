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
from hf_accel.quantization.calibrating.products import Product
from hf_accel.quantization.calibrating.refining import put_weights
from hf_accel.quantization.observing import Moment
from hf_accel.quantization.patcher import scale_dtype

ROWS = 8  # of the text, on which the errors of scales are compared
STEPS = 20  # values of the exponent in [0, 1)
_LEAST = 1e-4


@dataclass(frozen=True)
class Place:
    """Where a layer can be scaled: `source` is divided, the columns of `readers` are multiplied.

    rows: of a product's outputs, those that are divided; None: source is a norm. parent: whose output tells the error.
    """

    source: nn.Module
    rows: slice | None
    readers: tuple[Product, ...]
    parent: nn.Module
    adds_one: bool = False  # the norm multiplies by its weight plus one

    def divided(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new weight of a norm, and the scales [K] that it amounts to in its data type."""
        weight = self.source._parameters["weight"].detach()  # type: ignore[union-attr]
        one = 1.0 if self.adds_one else 0.0
        new = ((weight.float() + one) / scales - one).to(weight.dtype)
        found = (weight.float() + one) / (new.float() + one)
        return new, torch.where(found.isfinite() & (found > 0), found, torch.ones_like(found))


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


def most_places(blocks: Sequence[DecoderBlock]) -> int:
    """Return in how many places some layers can be scaled, if all of their products are rounded."""
    return sum((block.heads == block.kv_heads) + (3 if block.feed_forward is None else 1) for block in blocks)


def places_of(block: DecoderBlock, products: Sequence[Product], model: nn.Module) -> tuple[list[Place], list[str]]:
    """Return where a decoder layer can be scaled, and why elsewhere not."""
    by_module = {id(product.module): product for product in products}
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found, reasons = [], []
    form, gate, up, down = block.form, block.gate, block.up, block.down
    candidates: list[tuple[nn.Module, slice | None, list[nn.Module], nn.Module]] = []

    def add_norm(name: str, readers: list[nn.Module], parent: nn.Module) -> None:
        norm = block.norm(name)
        if norm is None:
            reasons.append("where products read the residual as it is")
        elif form.norms[name].kind == "layer" or form.norms[name].weight != "weight":
            reasons.append("where a layer norm comes before")
        else:
            candidates.append((norm, None, readers, parent))

    if form.is_parallel:
        reasons.append("where attention and feed-forward part run beside one another")
    else:
        add_norm("input", [part.module for part in block.projections], block.attention)
    if block.heads == block.kv_heads and (v := block.v) is not None:
        candidates.append((v.module, slice(v.start, v.stop), [block.o.module], block.o.module))
    if up is None or down is None:
        reasons.append("where a router and experts read what the norm gives")
    elif not form.is_parallel:
        add_norm("mlp", [part.module for part in (gate, up) if part is not None], up.parent)
    if gate is not None and up is not None and down is not None:
        candidates.append((up.module, slice(up.start, up.stop), [down.module], down.module))
    for source, rows, readers, parent in candidates:
        readers = list(dict.fromkeys(readers))
        rounded = [*readers, *([] if rows is None else [source])]
        if any(id(module) not in by_module for module in rounded):
            reasons.append("where not all of its products are rounded")
        elif any(counts[id(module._parameters["weight"])] > 1 for module in (source, *readers)):
            reasons.append("where weights are shared with another module")
        else:
            chosen = tuple(by_module[id(module)] for module in readers)
            adds_one = rows is None and any(n.kind == "rms_unit" for n in form.norms.values() if block.layer.get_submodule(n.path) is source)
            found.append(Place(source, rows, chosen, parent, adds_one))
    return found, reasons


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
        weight = place.source._parameters["weight"].detach()  # type: ignore[union-attr]
        by = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
        by[place.rows] = scales
        path = paths[id(place.source)]
        found.rows[path] = by * found.rows.get(path, 1.0)
        divided = (weight.float() / by[:, None]).to(weight.dtype)
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
