"""What weights in few bits are offered for a goal: the cheapest that keep its bound, where they are faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_accel.core.calls.report import Skip
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.allocating.bounded import choose_bits, measured
from hf_accel.quantization.timing import slower_products


def offered(goal: Goal, setting: Setting) -> Offer:
    """Return the bits of the weights for a lossy goal; no config, and the reason, where none keeps the bound."""
    name = WeightOnlyConfig.__name__
    if obstacles := Patcher.for_config(WeightOnlyConfig()).obstacles(setting):
        return Offer(skipped=[Skip(name, "; ".join(obstacle.rstrip(".") for obstacle in obstacles))])
    reference: Any = goal.reference and goal.reference()
    choice = choose_bits(setting, goal, reference)
    if choice.config is None:
        return Offer(skipped=[Skip(name, f"even 8 bits cost more than max_kl={goal.max_kl:g}: {choice.quality}")])
    slower = [] if goal.saves_memory or not setting.keeps_prepared else slower_products(setting, choice.config)
    if not slower:
        return Offer([choice.config], quality=choice.quality)
    reason = f"products that are not faster in few bits here stay as they are: {len(slower)}, {slower[0]} first"
    model = setting.model
    is_head_slow = model.get_output_embeddings() in {model.get_submodule(path) for path in slower}
    fewer = replace(
        choice.config,
        layers=(*((path, None) for path in slower), *choice.config.pairs),
        head=None if is_head_slow else choice.config.head,
    )
    fits = not Patcher.for_config(fewer).obstacles(setting)
    return Offer([fewer], [Skip(name, reason)], measured(setting, fewer, reference) if fits else choice.quality)
