"""Mixture-of-experts layers that keep the weights of all experts in 3-D parameters: two products per expert instead.

Only the experts a token is sent to are read. Products are [2 I, E] with gate above up and [E, I], however the model's
own parameters lie (see `core.model.experts`), each in bits of its own, with a bias where the model has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.model.experts import ExpertsLayout, layout_of
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.modules.routed import RoutedCall

PRODUCTS = ("gate_up_proj", "down_proj")
_WEIGHTS = torch.float32  # in which routers may give weights beside those of the dtype
_is_tracing, _is_compiling, _is_grad_enabled = torch.jit.is_tracing, torch.compiler.is_compiling, torch.is_grad_enabled


def known_layout(module: Any) -> ExpertsLayout | None:
    """Return how the weights of `module` lie, None where it holds no experts that could be packed."""
    try:
        return layout_of(module)
    except ValueError:
        return None


def shape_of(layout: ExpertsLayout, name: str) -> tuple[int, int]:
    """Return rows and columns of the product `name` of an expert."""
    return (layout.hidden, layout.inner) if name == "down_proj" else (2 * layout.inner, layout.hidden)


def weight_of(module: Any, layout: ExpertsLayout, name: str, index: int) -> Tensor:
    """Return the weight [N, K] of the product `name` of an expert, on its memory, with rows as they lie there."""
    weight: Tensor = getattr(module, name).detach()[index]
    return weight.T if layout.transposed else weight


def bias_of(module: Any, layout: ExpertsLayout, name: str, index: int) -> Tensor | None:
    """Return the bias [N] of the same, on its memory, None where there is none."""
    return getattr(module, f"{name}_bias").detach()[index] if layout.biased else None


def gate_first(rows: Tensor, layout: ExpertsLayout, name: str) -> Tensor:
    """Return rows (weights [N, K], biases [N], codes, scales or zeros) of the product `name` with gate above up."""
    if not layout.interleaved or name != "gate_up_proj":
        return rows
    return torch.cat((rows[::2], rows[1::2]))


def ordered(codes: Affine, bias: Tensor | None, layout: ExpertsLayout, name: str) -> tuple[Affine, Tensor | None]:
    """Return codes and bias of the product `name` with gate above up."""
    parts = [None if part is None else gate_first(part, layout, name) for part in (codes.zeros, bias)]
    rows = [gate_first(part, layout, name) for part in (codes.codes, codes.scales)]
    return Affine(rows[0], rows[1], parts[0], codes.scheme), parts[1]


def packed_product(
    module: Any, layout: ExpertsLayout, name: str, index: int, codes: Affine, dtype: torch.dtype
) -> QuantizedLinear:
    """Return the product `name` of an expert, given the codes of its rows as they lie; `dtype`: of the model."""
    codes, bias = ordered(codes, bias_of(module, layout, name, index), layout, name)
    # a bias has memory of its own: originals may be given up
    return QuantizedLinear(PackedWeight.pack(codes), None if bias is None else bias.clone(), dtype)


class SplitExperts(nn.Module):
    """The experts of one layer with a module for each product; rows of gate and up by turns where `by_turns`."""

    def __init__(self, gate_up: Sequence[nn.Linear], down: Sequence[nn.Linear], original: Any, by_turns: bool) -> None:
        super().__init__()
        # the original's rule for the gate may read any attribute: limits, factors, an activation, the config
        self.__dict__ |= {name: value for name, value in vars(original).items() if name not in self.__dict__}
        self._modules |= original._modules
        self.num_experts = len(gate_up)
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up), nn.ModuleList(down)
        self.original_class = type(original)
        self.by_turns = by_turns
        self.is_reordered = not original.is_concatenated and not by_turns

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map hidden_states [T, E], top_k_index and top_k_weights [T, k] to [T, E].

        An index out of range stands for no expert.
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            inner = self.gate_up_proj[expert](hidden_states[token])
            if self.is_reordered:
                inner = torch.stack(inner.chunk(2, dim=-1), dim=-1).flatten(-2)
            inner = self._apply_gate(inner)
            output = self.down_proj[expert](inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    def _apply_gate(self, inner: Tensor) -> Tensor:
        """Return what the class's own gate makes of gate and up [T, 2 I], by turns where the class has them so."""
        return self.original_class._apply_gate(self, inner)  # type: ignore[attr-defined, no-any-return]


class QuantizedExperts(SplitExperts):
    """The experts of one layer, each with packed gate_up [2 I, E], gate above up, and down [E, I] products.

    On the CPU they are one native call for any number of tokens. With gradients, under autocast, while traced, on other
    devices, or where a product is hooked or exchanged, the products run one after the other.
    counts: int64 [experts], rows sent to each expert in calls of `generate`, by whatever way; copies begin anew.
    """

    def __init__(self, gate_up: Sequence[QuantizedLinear], down: Sequence[QuantizedLinear], original: Any) -> None:
        super().__init__(gate_up, down, original, by_turns=False)
        self._routed: RoutedCall | None = None
        self.counts = _zeros(self.num_experts)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, on average where they have different bits."""
        parts = (self.gate_up_proj, self.down_proj)
        tensors = (tensor for part in parts for tensor in (*part.buffers(), *part.parameters()))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // self.num_experts

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_routed", "counts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._routed, self.counts = None, _zeros(self.num_experts)

    def _apply(self, *args: Any, **options: Any) -> Any:  # everything that moves a module goes through this
        self._routed = None
        return super()._apply(*args, **options)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map hidden_states [T, E], top_k_index and top_k_weights [T, k] to [T, E].

        An index out of range stands for no expert.
        """
        if (
            type(hidden_states) is Tensor
            and hidden_states.is_cpu
            and hidden_states.dtype in native.DTYPES
            and not _is_compiling()
            and not _is_tracing()
            and top_k_index.dtype is torch.int64
            and (top_k_weights.dtype is hidden_states.dtype or top_k_weights.dtype is _WEIGHTS)
            and not torch.is_autocast_enabled("cpu")
            and not (_is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad))
        ):
            routed = self._routed
            if routed is None or not routed.is_current(self, hidden_states.dtype):
                routed = self._routed = RoutedCall(self, hidden_states.dtype)
            if routed.kernel is not None:
                is_counted = request_in_progress() is not None
                return routed.kernel(hidden_states, top_k_index, top_k_weights, is_counted=is_counted)
        if not _is_compiling() and request_in_progress() is not None:
            chosen = top_k_index.detach().flatten().cpu()
            chosen = chosen[(chosen >= 0) & (chosen < self.num_experts)].long()
            self.counts += torch.bincount(chosen, minlength=self.num_experts)
        return super().forward(hidden_states, top_k_index, top_k_weights)


def _zeros(experts: int) -> Tensor:
    with torch.inference_mode(False):  # what is made under it cannot be added to outside of it
        return torch.zeros(experts, dtype=torch.int64, device="cpu")
