"""The names of attention of ours in the configs of optimised models, and the stock attention that each stands for."""

from __future__ import annotations

from typing import Any

from hf_accel.core.model.back_end_names import BackEndName

# names without "flash", "sdpa" or "flex", which transformers would take for its own back ends
NAME = BackEndName("hfaccel_grouped")
EAGER_NAME = BackEndName("hfaccel_eager", "eager")
NAMES = {name.stands_for: name for name in (NAME, EAGER_NAME)}


def name_in(config: Any) -> BackEndName | None:
    """Return the name of ours that a config of a model has, None if it has another."""
    name = getattr(config, "_attn_implementation", None)
    return name if isinstance(name, BackEndName) else None
