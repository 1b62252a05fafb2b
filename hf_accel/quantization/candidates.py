"""What weights in few bits are offered for a goal: the cheapest that keep its bound, where they are faster.

They are solved on text (GPTQ) where some is given, or where the model can write it, and the time that takes is stated:
up to MOST_CALIBRATING_S seconds are spent, and beyond that they are only rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_accel.core.calls.report import Skip
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import HfAccelError, described
from hf_accel.quantization import duration
from hf_accel.quantization.allocating.bounded import ChosenBits, candidates_for, choose_bits, measured
from hf_accel.quantization.calibrating.products import widest_of
from hf_accel.quantization.calibrating.text import text_for
from hf_accel.quantization.config import GPTQConfig, WeightOnlyConfig
from hf_accel.quantization.targets import targets
from hf_accel.quantization.timing import slower_products

MOST_CALIBRATING_S = 120.0
"""Seconds that goals spend on solving weights on text that the user gave, as estimated before."""
MOST_WRITING_S = 20.0
"""The same where the model has to write the text."""


def offered(goal: Goal, setting: Setting) -> Offer:
    """Return the bits of the weights for a lossy goal; no config, and the reason, where none keeps the bound."""
    name = WeightOnlyConfig.__name__
    if obstacles := Patcher.for_config(WeightOnlyConfig()).obstacles(setting):
        return Offer(skipped=[Skip(name, "; ".join(obstacle.rstrip(".") for obstacle in obstacles))])
    reference: Any = goal.reference and goal.reference()
    choice, skipped = _choice(goal, setting, reference)
    if choice.config is None:
        skipped.append(Skip(name, f"even 8 bits cost more than max_kl={goal.max_kl:g}: {choice.quality}"))
        return Offer(skipped=skipped)
    slower = [] if goal.saves_memory or not setting.keeps_prepared else slower_products(setting, choice.config)
    if not slower:
        return Offer([choice.config], skipped, choice.quality)
    reason = f"products that are not faster in few bits here stay as they are: {len(slower)}, {slower[0]} first"
    model = setting.model
    is_head_slow = model.get_output_embeddings() in {model.get_submodule(path) for path in slower}
    fewer = replace(
        choice.config,
        layers=(*((path, None) for path in slower), *choice.config.pairs),
        head=None if is_head_slow else choice.config.head,
    )
    fits = not Patcher.for_config(fewer).obstacles(setting)
    skipped.append(Skip(name, reason))
    return Offer([fewer], skipped, measured(setting, fewer, reference) if fits else choice.quality)


def _choice(goal: Goal, setting: Setting, reference: Any) -> tuple[ChosenBits, list[Skip]]:
    """Return what was chosen, of weights that are solved on text where that works and does not take too long."""
    name, most = GPTQConfig.__name__, MOST_WRITING_S if setting.calibration is None else MOST_CALIBRATING_S
    wanted = candidates_for(goal, is_calibrated=True)
    try:
        # the bound is mostly kept by the first few; mixed bits take no more solutions than 8 and 4 bits everywhere
        seconds = duration.calibrating_seconds(setting, wanted[-1], 2) if most else 1.0
        if seconds <= most:
            if setting.calibration is None:  # written once, and not for every candidate
                chosen, _ = targets(setting.anatomy, wanted[-1])
                setting.calibration = text_for(twin(setting.model), None, widest_of(chosen))
            return choose_bits(setting, goal, reference, is_calibrated=True), []
        text = (
            "writing text and solving weights on it" if setting.calibration is None else "solving weights on the text"
        )
        reason = f"{text} would take about {seconds:.0f} s, more than {most:.0f} s: weights are only rounded"
    except HfAccelError as error:
        reason = f"weights are only rounded: {error}"
    except Exception as error:  # of a model that reads text otherwise than any that was thought of
        reason = f"weights are only rounded, since they cannot be solved here ({described(error)})"
    return choose_bits(setting, goal, reference), [Skip(name, reason)]
