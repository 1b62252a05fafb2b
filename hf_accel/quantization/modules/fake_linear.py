"""A linear product in training: its weight is a parameter in floating point, and it computes with the rounded weight.

Beside a weight [N, K] in fp32 it keeps the codes that training started from, a byte per weight, so that the codes that
changed can be told at any time, after loading a checkpoint, too. Each forward pass rounds the weight anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_accel.ops.affine import Affine
from hf_accel.ops.fake_quantize import clipped, fake_quantized, inside, learned_affine, learned_scales


class FakeQuantizedLinear(nn.Module):
    """y = x Q(W)^T + bias for x [..., K]: Q(W) [N, K] is what the codes of `weight` stand for.

    Not a subclass of `nn.Linear`: what looks for those takes the weight for what the product computes with, as
    adapters do that are added beside it. `adapted` in quantization/adapting.py adds adapters to the weight itself.

    weight: parameter [N, K], fp32 whatever the model's dtype, as updates are smaller than what 16 bits hold.
    log_factors: parameter [N, groups], fp32: what is learned of the scales, see `learned_scales`; all 0 at first.
    is_on: False computes with `weight` as it is; scales then learn nothing, and conversion is refused.
    """

    weight: nn.Parameter
    log_factors: nn.Parameter
    start_scales: Tensor
    start_codes: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        start: Affine,
        *,
        scale_dtype: torch.dtype,
        learn_scales: bool = True,
    ) -> None:
        """Begin with the codes and scales of `start`, and with the weight nearest to `weight` [N, K] that has them."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme, self.scale_dtype = start.scheme, scale_dtype
        self.is_on = True
        with torch.inference_mode(False):
            self.weight = nn.Parameter(inside(weight.detach(), start))
            self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
            self.log_factors = nn.Parameter(torch.zeros_like(start.scales, dtype=torch.float32), learn_scales)
            self.register_buffer("start_scales", start.scales.float().clone())
            self.register_buffer("start_codes", start.codes.clone())
            self.register_buffer("zeros", None if start.zeros is None else start.zeros.clone())

    @property
    def scales(self) -> Tensor:
        """Return the scales [N, groups] as they are now: fp32, with values of `scale_dtype`."""
        return learned_scales(self.start_scales, self.log_factors.detach(), self.scale_dtype)

    def affine(self) -> Affine:
        """Return codes, scales and zeros as they are now: what is deployed."""
        return learned_affine(self.weight.detach(), self.scales, self.zeros, self.scheme)

    def clipped(self) -> Tensor:
        """Return which weights lie beyond the outermost codes, bool [N, K]: their codes cannot follow them."""
        return clipped(self.weight, self.affine())

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x Q(weight)^T + bias for a weight [N, K] in the place of `self.weight`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self.is_on:
            weight = fake_quantized(
                weight, self.start_scales, self.log_factors, self.zeros, self.scheme, self.scale_dtype, dtype
            )
        return functional.linear(x, weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model, but keep weights and scales in fp32 when it is cast."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if changed.dtype is not tensor.dtype else changed

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        group = f"group_size={self.scheme.group_size}" if self.scheme.group_size else "per channel"
        off = "" if self.is_on else ", off"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.scheme.bits}, "
            f"{group}{off}"
        )
