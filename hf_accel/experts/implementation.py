"""The implementation `hf_accel` in transformers' registry of expert implementations.

Every module that transformers decorates with `use_experts_implementation` looks the name in its config up there. What
the native call does not cover goes to the implementation that the config named before.
"""

from __future__ import annotations

from typing import Any, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_accel.experts.step import ExpertsStep

KEY = "hf_accel"
STEPS: WeakKeyDictionary[nn.Module, ExpertsStep] = WeakKeyDictionary()
"""Module of experts -> its native call, which holds the module's tensors but not the module."""


class ImplementationName(str):
    """The name in the config of an optimised model; copies and pickles of it say what stood there before.

    A deep copy or a saved pickle of an optimised model is a stock model, which works where hf_accel is not installed.
    """

    stock: str

    def __new__(cls, stock: str) -> ImplementationName:
        made = super().__new__(cls, KEY)
        made.stock = stock
        return made

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type, tuple[str]]:
        return str, (self.stock,)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Map hidden_states [T, E], top_k_index and top_k_weights [T, k] to [T, E], as transformers' implementations do."""
    step = STEPS.get(module)
    if step is not None:
        output = step.output(module, hidden_states, top_k_index, top_k_weights)
        if output is not None:
            return output
        if not torch.compiler.is_compiling():
            step.count(top_k_index)
    return stock_forward(module, hidden_states, top_k_index, top_k_weights)


def stock_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the same by the implementation that the module's config named before."""
    name = module.config._experts_implementation
    stock = getattr(name, "stock", "eager" if name == KEY else name)  # a user may have set the plain name
    forward: Any = ALL_EXPERTS_FUNCTIONS.get(stock) if stock != "eager" else None
    if forward is None:
        forward = type(module).forward.__wrapped__
    return forward(module, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


ALL_EXPERTS_FUNCTIONS.register(KEY, experts_forward)
