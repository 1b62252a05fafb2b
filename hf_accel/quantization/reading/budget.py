"""Bits that fit a budget of memory: of what could be chosen, in the order of what it costs, the first that fits.

The order is that of the measured divergence (docs/results.md): tables of embeddings in 8 bits cost less than any step
to fewer bits of the products. Cost: the model's empty skeleton.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.rebuilding import skeleton
from hf_accel.quantization.patcher import WeightOnlyPatcher
from hf_accel.quantization.targets import targets

LADDER = tuple(
    WeightOnlyConfig(bits=bits, group_size=group, embeddings=embeddings)
    for bits, group in ((8, None), (4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (2, 32), (2, 64))
    for embeddings in (None, 8)
)


def chosen_bits(config: Any, budget_bytes: int) -> WeightOnlyConfig | None:
    """Return how a model of this transformers config is rounded to fit a budget, None where it fits as it is.

    budget_bytes: of all weights afterwards, and of the largest that is rounded while it is read.

    Raises:
        ConfigError: nothing fits; what would is stated. Or the budget is not a number of bytes.
        UnsupportedModelError: no product of the model can be rounded.
    """
    if type(budget_bytes) is not int or budget_bytes < 1:
        raise ConfigError(f"memory_budget_bytes is a whole number, at least 1; {budget_bytes!r} was given.")
    model = skeleton(config, config.dtype)
    model.tie_weights()
    setting = Setting(Anatomy(model, torch.device("cpu"), config.dtype))
    if setting.anatomy.weight_bytes <= budget_bytes:
        return None
    fewest = None
    for rounding in LADDER:
        patcher = WeightOnlyPatcher(rounding)
        if misfits := patcher.misfits(setting.anatomy):
            raise UnsupportedModelError(f"This {type(model).__name__} cannot be read in few bits: {misfits[0]}")
        weights, hand = patcher.weight_bytes(setting), _largest(setting.anatomy, rounding)
        if weights + hand <= budget_bytes:
            return rounding
        if fewest is None or weights + hand < sum(fewest):
            fewest = weights, hand
    weights, hand = fewest or (0, 0)
    raise ConfigError(
        f"A {type(model).__name__} of {setting.anatomy.weight_bytes} bytes does not fit memory_budget_bytes="
        f"{budget_bytes}: in the fewest bits its weights take {weights} bytes, and reading them {hand} more. "
        f"memory_budget_bytes={weights + hand} is the least that fits."
    )


def _largest(anatomy: Anatomy, rounding: WeightOnlyConfig) -> int:
    """Return the bytes of the largest weight that is rounded."""
    rounded = [weight for target in targets(anatomy, rounding)[0] for weight in target.weights]
    if rounding.embeddings is not None:
        rounded.append(anatomy.model.get_input_embeddings().weight)
    return max(weight.numel() * weight.element_size() for weight in rounded)
