"""What a module of stacked experts computes: how its weights lie, and how an expert joins gate and up.

The layout is what transformers' decorator `use_experts_implementation` notes on every such module. The gate is found by
running the module's own on a few values: a class that computes something else than it did costs speed, not correctness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels.native import Gate

_PROBES = 64  # values of gate and of up
_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
}


@dataclass(frozen=True)
class ExpertsLayout:
    """Sizes and layout of a module of experts.

    gate_up_proj is [experts, 2 inner, hidden] and down_proj [experts, hidden, inner]; transposed: the last two
    dimensions change places. interleaved: gate and up lie by turns; else all of gate first.
    """

    experts: int
    hidden: int
    inner: int
    interleaved: bool
    transposed: bool
    biased: bool


@dataclass(frozen=True)
class ExpertsForm(ExpertsLayout):
    """Sizes, layout and gate of a module of experts."""

    gate: Gate


def described_experts(module: Any) -> ExpertsForm:
    """Return what `module` computes.

    Raises:
        ValueError: the reason why it cannot be told.
    """
    layout = layout_of(module)
    return ExpertsForm(**vars(layout), gate=gate_of(module, layout.interleaved))


def layout_of(module: Any) -> ExpertsLayout:
    """Return how the weights of `module` lie, whatever its gate computes.

    Raises:
        ValueError: the reason why it cannot be told.
    """
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    biased = getattr(module, "has_bias", None)
    names = {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if biased else set())
    if getattr(module, "has_gate", None) is not True:
        raise ValueError("they have no gate in transformers' layout")
    if getattr(module, "has_post_expert_norm", None) is not False:
        raise ValueError("each expert is followed by a norm of its own")
    if set(own) != names or len(own["gate_up_proj"]) != 3 or len(own["down_proj"]) != 3:
        raise ValueError(f"their tensors are {', '.join(sorted(own))}")
    transposed, interleaved = bool(module.is_transposed), not module.is_concatenated
    experts, inner, hidden = own["down_proj"] if transposed else (own["down_proj"][0], *own["down_proj"][:0:-1])
    both = (hidden, 2 * inner) if transposed else (2 * inner, hidden)
    if own["gate_up_proj"] != (experts, *both):
        raise ValueError(f"gate_up_proj {own['gate_up_proj']} does not fit down_proj {own['down_proj']}")
    if biased and (own["gate_up_proj_bias"], own["down_proj_bias"]) != ((experts, 2 * inner), (experts, hidden)):
        raise ValueError("their biases do not fit their weights")
    return ExpertsLayout(experts, hidden, inner, interleaved, transposed, bool(biased))


def gate_of(module: Any, interleaved: bool) -> Gate:
    """Return how the experts of `module` join gate and up, which its own gate takes by turns where `interleaved`.

    Raises:
        ValueError: in none of the ways known here.
    """
    values = torch.linspace(-20, 20, _PROBES, dtype=torch.float64)
    gate = values[torch.randperm(_PROBES, generator=torch.Generator().manual_seed(0))]
    given = torch.stack((gate, values), dim=-1).flatten() if interleaved else torch.cat((gate, values))
    with torch.no_grad():
        found = module._apply_gate(given[None])[0].double()
    for candidate in _candidates(module):
        if found.shape == gate.shape and torch.allclose(
            found, apply_gate(candidate, gate, values), rtol=1e-6, atol=1e-6
        ):
            return candidate
    raise ValueError(f"their gate ({type(module).__name__}._apply_gate) is none of those known here")


def _candidates(module: Any) -> list[Gate]:
    def number(*names: str) -> float:
        found = [getattr(module, name, None) for name in names]
        return next((float(value) for value in found if isinstance(value, (int, float))), 0.0)

    limit, alpha = number("limit", "swiglu_limit"), number("alpha", "swiglu_alpha")
    plain = [Gate(name, 0.0, bound) for name in _ACTIVATIONS for bound in {0.0, limit}]
    return [*plain, Gate("silu", alpha, limit), Gate("silu", alpha, 0.0)]


def apply_gate(form: Gate, gate: Tensor, up: Tensor) -> Tensor:
    """Return what an expert computes of its gate and its up part, of one shape."""
    if form.limit:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    if form.alpha:
        return (up + 1) * (gate * torch.sigmoid(gate * form.alpha))
    return _ACTIVATIONS[form.activation](gate) * up


_ACTIVE = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")


def active_experts(model: Any) -> int | None:
    """Return the experts of a token in one layer; None where the model's config does not say."""
    config = model.config.get_text_config(decoder=True)
    found = [value for name in _ACTIVE if isinstance(value := getattr(config, name, None), int)]
    return found[0] if found else None


@runtime_checkable
class RoutedExperts(Protocol):
    """A module of experts that makes a native call of its own and counts what it is sent.

    counts: int64 [experts], rows by expert; expert_bytes: bytes of one expert's weights.
    """

    counts: Tensor

    @property
    def expert_bytes(self) -> int: ...
