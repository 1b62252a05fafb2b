"""Bits per layer within a bound on the KL divergence, measured on the model itself.

The cheapest candidate that keeps the bound wins. Where 4 bits everywhere break it, each decoder layer is measured
alone at 4 bits with all others at 8; the costs of layers add up well while they are small, so the layers that cost
least go to 4 bits until the bound is reached, and the whole is measured once more. Cost: one forward over the text
per candidate.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel.core.calls.hosting import Host
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.plan import Plan, Step, new_report
from hf_accel.measure.quality import Quality, QualityReference
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.targets import targets

DEFAULT_MAX_KL = {"fast": 0.05, "memory": 0.2}
"""Nats per token. See docs/quantization.md for what these mean on trained models."""
CANDIDATES = {
    "fast": (WeightOnlyConfig(bits=4, group_size=64), WeightOnlyConfig(bits=4, group_size=32)),
    "memory": tuple(WeightOnlyConfig(bits=4, group_size=size, embeddings=8) for size in (128, 64, 32)),
}


@dataclass(frozen=True)
class Choice:
    """The config that was chosen (None: not even 8 bits keep the bound) and what it was measured to cost."""

    config: WeightOnlyConfig | None
    quality: Quality


def choose_bits(
    anatomy: Anatomy, goal: str, reference: QualityReference, max_kl: float, progress: Callable[[], None] | None = None
) -> Choice:
    """Return the cheapest config of the goal that keeps `max_kl`, measured; the model is left as it was."""

    def cost(config: WeightOnlyConfig) -> Quality:
        try:
            return measured(anatomy, config, reference)
        finally:
            if progress is not None:
                progress()

    # where its groups do not divide the columns a product gets 8 bits, so the order depends on the model
    for config in sorted(CANDIDATES[goal], key=lambda c: Patcher.for_config(c).weight_bytes(anatomy) or 0):
        quality = cost(config)
        if quality.kl <= max_kl:
            return Choice(config, quality)
    finest = CANDIDATES[goal][-1]
    eight = replace(finest, bits=8, group_size=None)
    quality = cost(eight)
    if not quality.kl <= max_kl:  # NaN, too
        return Choice(None, quality)
    patterns = _layer_patterns(anatomy, finest)
    costs = {}
    for pattern in patterns:
        others = tuple((other, 8) for other in patterns if other != pattern)
        costs[pattern] = max(0.0, cost(replace(finest, layers=(*others, (pattern, 4), ("*", 8)))).kl - quality.kl)
    spent, four = quality.kl, []
    for pattern in sorted(patterns, key=costs.__getitem__):
        spent += costs[pattern]
        if spent > max_kl:
            break
        four.append(pattern)
    while four:
        config = replace(finest, layers=(*((pattern, 4) for pattern in four), ("*", 8)))
        mixed = cost(config)
        if mixed.kl <= max_kl:
            return Choice(config, mixed)
        four = four[: len(four) * 3 // 4]
    return Choice(eight, quality)


def measured(anatomy: Anatomy, config: WeightOnlyConfig, reference: QualityReference) -> Quality:
    """Return what `config` costs; the model is left as it was."""
    journal = Journal()
    plan = Plan(steps=[Step(config)])
    try:
        plan.apply(anatomy, Host(journal, new_report(anatomy, plan)))
        return reference.compare()
    finally:
        journal.undo()


def _layer_patterns(anatomy: Anatomy, config: WeightOnlyConfig) -> list[str]:
    """Name patterns of the decoder layers: what stands before the first number in the name of a product."""
    found: dict[str, None] = {}
    for target in targets(anatomy, config)[0]:
        if match := re.match(r"(.*?\.\d+)\.", target.path):
            found[match.group(1) + ".*"] = None
    return list(found)


@torch.no_grad()
def losers(anatomy: Anatomy, config: WeightOnlyConfig, rounds: int = 5) -> list[str]:
    """Return the names of products that are not faster in few bits, timed shape by shape at one row.

    The products of a shape take turns, so that their weights come from memory and not from a cache. Looks at the
    replacements that `anatomy.prepared` holds.
    """
    shapes: dict[Any, list[Any]] = {}
    for target in targets(anatomy, config)[0]:
        ready = anatomy.prepared_for(target.module)
        made = next((m for key, m in ready.items() if key[0] == target.scheme), None)
        if target.scheme is not None and isinstance(made, QuantizedLinear):
            key = (made.in_features, made.out_features, target.scheme)
            shapes.setdefault(key, []).append((target, made))
    found = []
    for (columns, _, _), members in shapes.items():
        x = torch.zeros(1, columns, dtype=anatomy.dtype, device=anatomy.device)
        dense = [member.module for member, _ in members[:8]]
        packed = [made for _, made in members[:8]]
        seconds: dict[str, list[float]] = {"dense": [], "packed": []}
        for _ in range(rounds):
            for name, modules in (("dense", dense), ("packed", packed)):
                start = time.perf_counter()
                for module in modules:
                    module(x)
                seconds[name].append(time.perf_counter() - start)
        if statistics.median(seconds["packed"]) > statistics.median(seconds["dense"]):
            found += [target.path for target, _ in members]
    return found


__all__ = ["CANDIDATES", "DEFAULT_MAX_KL", "Choice", "choose_bits", "losers", "measured"]
