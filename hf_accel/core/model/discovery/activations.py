"""Which activation a module computes, found by running it on a few values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_GRID = torch.linspace(-6, 6, 193)


def described_activation(module: Any) -> str | None:
    """Return the name of the activation that `module` computes elementwise; None: no known one."""
    try:
        with torch.no_grad():
            found = copy.deepcopy(module).float().to("cpu")(_GRID.clone())
    except Exception:
        return None
    if not isinstance(found, Tensor) or found.shape != _GRID.shape:
        return None
    names = [name for name, function in ACTIVATIONS.items() if float((function(_GRID) - found).abs().max()) < 2e-6]
    return names[0] if len(names) == 1 else None
