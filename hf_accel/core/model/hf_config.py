"""The configuration objects of a model: many modules share one, and other models built from it may, too."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from hf_accel.core.journal import Journal


def own_configs(model: Any, journal: Journal) -> list[Any]:
    """Give the model configs of its own and return them: models built from one config object share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is None:
            continue
        if id(config) not in copies:
            copies[id(config)] = own = copy.deepcopy(config)
            journal.did(partial(_carry_over, own, dict(vars(own)), config))
        journal.set_attribute(module, "config", copies[id(config)])
    return list(copies.values())


def _carry_over(own: Any, before: dict[str, Any], original: Any) -> None:
    """Write to the original what the user changed in the model's own config: a resized vocabulary, other attention."""
    for name, value in vars(own).items():
        if name not in before or (before[name] is not value and before[name] != value):
            vars(original)[name] = value
