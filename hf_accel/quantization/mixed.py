"""Bits per layer within a bound on the KL divergence, measured on the model itself.

The cheapest candidate that keeps the bound wins. Where 4 bits everywhere break it, each decoder layer is measured
alone at 4 bits with all others at 8; the costs of layers add up well while they are small, so the layers that cost
least go to 4 bits until the bound is reached, and the whole is measured once more. Cost: one forward over the text
per candidate.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.goal import Goal
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import Quality, QualityReference
from hf_accel.quantization import WeightOnlyConfig
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import targets

# the last is the finest
FOR_SPEED = (WeightOnlyConfig(bits=4, group_size=64), WeightOnlyConfig(bits=4, group_size=32))
FOR_MEMORY = tuple(WeightOnlyConfig(bits=4, group_size=size, embeddings=8) for size in (128, 64, 32))


@dataclass(frozen=True)
class Choice:
    """The config that was chosen (None: not even 8 bits keep the bound) and what it was measured to cost."""

    config: WeightOnlyConfig | None
    quality: Quality


def choose_bits(setting: Setting, goal: Goal, reference: QualityReference) -> Choice:
    """Return the cheapest config that keeps the goal's bound, measured; the model is left as it was."""
    max_kl = math.inf if goal.max_kl is None else goal.max_kl
    candidates = FOR_MEMORY if goal.saves_memory else FOR_SPEED

    def cost(config: WeightOnlyConfig) -> Quality:
        try:
            return measured(setting, config, reference)
        finally:
            setting.advance()

    # where its groups do not divide the columns a product gets 8 bits, so the order depends on the model
    for config in sorted(candidates, key=lambda c: Patcher.for_config(c).weight_bytes(setting) or 0):
        quality = cost(config)
        if quality.kl <= max_kl:
            return Choice(config, quality)
    finest = candidates[-1]
    eight = replace(finest, bits=8, group_size=None)
    quality = cost(eight)
    if not quality.kl <= max_kl:  # NaN, too
        return Choice(None, quality)
    patterns = _layer_patterns(setting.anatomy, finest)
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


def measured(setting: Setting, config: WeightOnlyConfig, reference: QualityReference) -> Quality:
    """Return what `config` costs; the model is left as it was."""
    with applied(Plan(steps=[Step(config)]), setting):
        return reference.compare()


def _layer_patterns(anatomy: Anatomy, config: WeightOnlyConfig) -> list[str]:
    """Name patterns of the decoder layers: what stands before the first number in the name of a product."""
    found: dict[str, None] = {}
    for target in targets(anatomy, config)[0]:
        if match := re.match(r"(.*?\.\d+)\.", target.path):
            found[match.group(1) + ".*"] = None
    return list(found)


@torch.no_grad()
def losers(setting: Setting, config: WeightOnlyConfig, rounds: int = 5) -> list[str]:
    """Return the names of products that are not faster in few bits, timed shape by shape at one row.

    The products of a shape take turns, so that their weights come from memory and not from a cache. Looks at the
    replacements that the setting keeps.
    """
    anatomy = setting.anatomy
    shapes: dict[Any, list[Any]] = {}
    for target in targets(anatomy, config)[0]:
        ready = setting.prepared_for(target.module)
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


__all__ = ["Choice", "choose_bits", "losers", "measured"]
