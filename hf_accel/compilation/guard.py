"""Whether a model is still what was captured, asked once per call: replays call none of its code."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_accel.compilation.slots import Slots
from hf_accel.core.calls.inputs import has_stock_inputs
from hf_accel.core.model.support import foreign_inputs
from hf_accel.core.model.watching import Watch

MOST_CHANGES = 8  # of the model, after which nothing is captured any more


class ModelGuard:
    """Watches one model: what was captured is given up where its modules or tensors are no longer the same."""

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        self._model = weakref.ref(model)
        self._watch: Watch | None = None
        self._modes: Any = None
        self._changes = -1  # the first look is none
        self.on_change: list[Callable[[], None]] = [slots.forget_captures]

    def obstacle(self) -> str | None:
        """Return why steps of this call cannot be replayed, None if they can."""
        model: Any = self._model()
        if model.training:
            return "the model is in training mode"
        if any(hasattr(type(module), "_active_adapter") for module in model.modules()):  # layers of peft
            return "adapters can be switched at any time"
        if reason := foreign_inputs(model):
            return reason
        if not has_stock_inputs(model):
            return "the model prepares its inputs by code of its own"
        if torch.is_autocast_enabled(model.device.type):
            return "autocast chooses dtypes call by call"
        if model.config.output_attentions or model.config.output_hidden_states:
            return "attentions or hidden states are asked for"
        if self._watch is not None and self._watch.is_hooked():
            return "modules of the model have hooks"
        return self._change_obstacle(model)

    def _change_obstacle(self, model: Any) -> str | None:
        modes = (model.config._attn_implementation, *_process_modes())
        if self._watch is None or not self._watch.is_in_place() or modes != self._modes:
            self._changes += 1
            for forget in self.on_change:
                forget()
            self._watch, self._modes = Watch(model, list(model.modules())[1:]), modes
            if self._watch.is_hooked():
                return "modules of the model have hooks"
        return "the model changes from call to call" if self._changes > MOST_CHANGES else None


def _process_modes() -> tuple[Any, ...]:
    """Return the switches of torch that decide which kernels run."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
