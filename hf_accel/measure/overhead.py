"""What a `generate` call costs beside its forward passes: preparation, the token loop, the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class CallCost:
    """One `generate` call for one new token: the whole call, and its part outside the model's forward."""

    whole_s: float
    fixed_s: float


def call_cost(model: PreTrainedModel, inputs: Mapping[str, Any], **arguments: Any) -> CallCost:
    """Generate one token from `inputs` and return what the call cost.

    The forward is timed by hooks on the outermost module, which stock and patched models both call.
    """
    inside: list[float] = []
    entered = 0.0

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = time.perf_counter()

    def leave(*_: Any) -> None:
        inside.append(time.perf_counter() - entered)

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, **({"do_sample": False} | arguments))  # type: ignore[operator]
        whole = time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()
    return CallCost(whole, whole - sum(inside))
