"""What each expert of a layer costs in each width: its part in the cost of all of them.

The KL divergence is measured with all experts of a layer in one width, as for any group. An expert's part in it, and
what it costs in another width, is the squared error that its rounding leaves in the layer's output, over the tokens
that the router sends it and by the weights that it gives: heat times error of outputs. Errors of experts add up, since
those of different experts have nothing to do with each other. An expert that sees few tokens of the text is given one
more, of the layer's mean error, so that none costs nothing. Cost beside that of a group: its experts once over the
tokens they were sent, in every width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, dequantize
from hf_accel.quantization.allocating.groups import Group
from hf_accel.quantization.allocating.listening import Given
from hf_accel.quantization.calibrating.products import Product
from hf_accel.quantization.calibrating.refining import put_weights
from hf_accel.quantization.observing import Moment

Rounded = Callable[[Product, int], Affine]


def joined(groups: Sequence[Group]) -> list[tuple[Group, list[Group]]]:
    """Return groups with those of experts of one module as one, in their order, each with what it is made of."""
    members: dict[str, list[Group]] = {}
    for group in groups:
        members.setdefault(group.name if group.expert is None else group.targets[0].path, []).append(group)
    found = []
    for name, own in members.items():
        first = own[0]
        nbytes = [sum(group.options[i].nbytes for group in own) for i in range(len(first.options))]
        options = tuple(replace(option, nbytes=n) for option, n in zip(first.options, nbytes, strict=True))
        whole = Group(name, first.targets, options, sum(g.weights for g in own), sum(g.original_bytes for g in own))
        found.append((first if first.expert is None else whole, own))
    return found


def costs_apart(
    experts: Any,
    groups: Sequence[Group],
    products: Sequence[Product],
    given: Given,
    moments: Mapping[str, Moment],
    measured: int,
    rounded: Rounded,
    kl: Callable[[list[tuple[Product, Affine]]], float],
) -> list[Group]:
    """Return the groups of the experts of one module with the cost of their options.

    products: of gate and up of all experts, then of down; rounded: the codes of a product in an option; kl: what codes
    of all products cost together, which is measured for the option `measured`.
    """
    count, options = len(groups), range(len(groups[0].options))
    errors = torch.zeros(count, len(options), dtype=torch.float64)  # squared, over the tokens that were kept
    kept, tokens = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    codes: list[tuple[Product, Affine]] = []
    for expert in range(count):
        pair = [products[expert], products[count + expert]]
        hidden, weights = given.of(expert)
        kept[expert] = len(hidden)
        tokens[expert] = moments[pair[0].path].count if pair[0].path in moments else 0
        originals = [product.module._parameters["weight"] for product in pair]
        expected = _output(experts, pair, hidden)
        for i in options:
            chosen = [(product, rounded(product, i)) for product in pair]
            if i == measured:
                codes += chosen
            try:
                put_weights([(product, dequantize(affine)) for product, affine in chosen])
                error = (_output(experts, pair, hidden) - expected) * weights
            finally:
                for product, original in zip(pair, originals, strict=True):
                    product.module._parameters["weight"] = original
            errors[expert, i] = float(error.double().square().sum())
    means = errors.sum(dim=0) / kept.sum().clamp(min=1)
    costs = (errors + means) / (kept[:, None] + 1) * (tokens[:, None] + 1)
    total = float(costs[:, measured].sum())
    costs = costs * (max(0.0, kl(codes)) / total) if total > 0 else torch.zeros_like(costs)
    return [
        replace(group, options=tuple(replace(o, kl=float(costs[e, i])) for i, o in enumerate(group.options)))
        for e, group in enumerate(groups)
    ]


def _output(experts: Any, pair: Sequence[Product], hidden: Tensor) -> Tensor:
    """Return what an expert makes of hidden states [n, E]."""
    if not len(hidden):
        return hidden
    gate_up, down = (product.module for product in pair)
    return down(experts._apply_gate(gate_up(hidden))).float()  # type: ignore[no-any-return]
