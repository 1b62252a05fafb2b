"""Bits per layer within a bound on the KL divergence, measured on the model itself.

The cheapest candidate that keeps the bound wins; the goal "memory" begins at 2 bits. Where 4 bits everywhere break it,
each decoder layer is measured alone at 4 bits with all others at 8; the costs of layers add up well while they are
small, so the layers that cost least go to 4 bits until the bound is reached, and the whole is measured once more.
Cost: one forward over the text per candidate, and where weights are solved on text a solution of every product in
each scheme.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.goal import Goal
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.quality import Quality, QualityReference
from hf_accel.quantization.config import GPTQConfig, WeightOnlyConfig
from hf_accel.quantization.targets import targets

# the last is the finest
FOR_SPEED = (WeightOnlyConfig(bits=4, group_size=64), WeightOnlyConfig(bits=4, group_size=32))
FOR_MEMORY = tuple(
    WeightOnlyConfig(bits=bits, group_size=size, embeddings=8)
    for bits, size in ((2, 64), (3, 64), (4, 128), (4, 64), (4, 32))
)
_Cost = Callable[[WeightOnlyConfig], Quality]


@dataclass(frozen=True)
class ChosenBits:
    """The config that was chosen (None: not even 8 bits keep the bound) and what it was measured to cost."""

    config: WeightOnlyConfig | None
    quality: Quality


def candidates_for(goal: Goal, is_calibrated: bool = False) -> tuple[WeightOnlyConfig, ...]:
    """Return what is tried for a goal, the finest last; `is_calibrated`: solved on text, and not only rounded."""
    plain = FOR_MEMORY if goal.saves_memory else FOR_SPEED
    return tuple(map(_calibrated, plain)) if is_calibrated else plain


def _calibrated(config: WeightOnlyConfig) -> WeightOnlyConfig:
    return GPTQConfig(bits=config.bits, group_size=config.group_size, embeddings=config.embeddings)


def choose_bits(setting: Setting, goal: Goal, reference: QualityReference, is_calibrated: bool = False) -> ChosenBits:
    """Return the cheapest config that keeps the goal's bound, measured; the model is left as it was.

    Raises:
        HfAccelError: weights cannot be solved on the text of the setting, where `is_calibrated` asks for that.
    """
    max_kl = math.inf if goal.max_kl is None else goal.max_kl
    candidates = candidates_for(goal, is_calibrated)

    def cost(config: WeightOnlyConfig) -> Quality:
        try:
            return measured(setting, config, reference)
        finally:
            setting.advance()

    # where its groups do not divide the columns a product gets 8 bits, so the order depends on the model
    for config in sorted(candidates, key=lambda c: Patcher.for_config(c).weight_bytes(setting) or 0):
        quality = cost(config)
        if quality.kl <= max_kl:
            return ChosenBits(config, quality)
    finest = candidates[-1]
    eight = replace(finest, bits=8, group_size=None)
    quality = cost(eight)
    if not quality.kl <= max_kl:  # NaN, too
        return ChosenBits(None, quality)
    layers = _layer_patterns(setting.anatomy, finest)
    return _choose_mixed(layers, finest, quality.kl, max_kl, cost) or ChosenBits(eight, quality)


def _choose_mixed(
    layers: list[str], finest: WeightOnlyConfig, kl_at_8: float, max_kl: float, cost: _Cost
) -> ChosenBits | None:
    """Return as many layers at 4 bits as keep the bound beside the others at 8; None where not one does."""
    added: dict[str, float] = {}  # layer pattern -> KL that it adds at 4 bits
    for layer in layers:
        others = tuple((other, 8) for other in layers if other != layer)
        config = replace(finest, layers=(*others, (layer, 4), ("*", 8)))
        added[layer] = max(0.0, cost(config).kl - kl_at_8)
    total, at_4_bits = kl_at_8, []
    for layer in sorted(layers, key=added.__getitem__):
        total += added[layer]
        if total > max_kl:
            break
        at_4_bits.append(layer)
    while at_4_bits:
        config = replace(finest, layers=(*((layer, 4) for layer in at_4_bits), ("*", 8)))
        quality = cost(config)
        if quality.kl <= max_kl:
            return ChosenBits(config, quality)
        at_4_bits = at_4_bits[: len(at_4_bits) * 3 // 4]
    return None


def measured(setting: Setting, config: WeightOnlyConfig, reference: QualityReference) -> Quality:
    """Return what `config` costs; the model is left as it was."""
    with applied(Plan(steps=[Step(config)]), setting):
        return reference.compare()


def _layer_patterns(anatomy: Anatomy, config: WeightOnlyConfig) -> list[str]:
    """Return a name pattern for each decoder layer: names of products up to their first number."""
    found: dict[str, None] = {}
    for target in targets(anatomy, config)[0]:
        if match := re.match(r"(.*?\.\d+)\.", target.path):
            found[match.group(1) + ".*"] = None
    return list(found)
