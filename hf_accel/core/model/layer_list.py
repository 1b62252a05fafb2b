"""Where a model has its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    """Return name and list of the decoder layers.

    Raises:
        LookupError: there is no list of as many modules as the config says there are layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise LookupError(f"there is no list of {count} layers in {type(model).__name__}")
