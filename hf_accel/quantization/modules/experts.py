"""Mixture-of-experts layers that keep the weights of all experts in 3-D parameters: one packed weight per expert.

Only the experts a token is sent to are read. The layout is transformers' own (`use_experts_implementation`):
gate_up_proj [experts, 2 I, E] with gate above up, down_proj [experts, E, I].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.quantization.modules.linear import QuantizedLinear

# what transformers' decorator notes about an experts class, and the values of the layout described above
_LAYOUT = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}


def has_known_layout(module: Any) -> bool:
    """Return whether the experts of `module` are laid out as described above."""
    own = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return own == {"gate_up_proj": 3, "down_proj": 3} and all(
        getattr(module, name, None) is value for name, value in _LAYOUT.items()
    )


class QuantizedExperts(nn.Module):
    """The experts of one layer, each with packed gate_up [2 I, E] and down [E, I] products."""

    def __init__(self, gate_up: list[QuantizedLinear], down: list[QuantizedLinear], original: Any) -> None:
        super().__init__()
        # the original's rule for the gate may read any attribute: limits, factors, an activation, the config
        self.__dict__ |= {name: value for name, value in vars(original).items() if name not in self.__dict__}
        self._modules |= original._modules
        self.num_experts = len(gate_up)
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up), nn.ModuleList(down)
        self.original_class = type(original)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map hidden_states [T, E], top_k_index and top_k_weights [T, k] to [T, E].

        The index `num_experts` stands for no expert.
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            inner = self.gate_up_proj[expert](hidden_states[token])
            inner = self._apply_gate(inner)
            output = self.down_proj[expert](inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.original_class._apply_gate(self, gate_up)  # type: ignore[attr-defined,no-any-return]
