"""A decoder layer over a static cache in about nine launches, of kernels in Triton or of their twins in torch.

Nothing depends on what only the host knows: a step made of it can be captured as a graph. Cost: the layer's weights and
what the cache is filled with are read once, activations a few times.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native.block_weights import BlockShape, BlockWeights, Projection
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import norms, products, rotary
from hf_accel.ops.static_attention import static_attention

MAX_ROWS = 32
MAX_TOKENS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Kernels:
    """The operations that a layer is made of. dense, packed: modules with `linear` and `gated`."""

    dense: Any
    packed: Any
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary_write: Callable[..., Tensor]
    attention: Callable[..., Tensor]


class _Unpacked:
    """Products with packed weights in torch: on the values that the codes stand for."""

    @staticmethod
    def linear(x: Tensor, weights: Sequence[PackedWeight], *rest: Any) -> Tensor:
        return products.linear(x, [weight.dequantize(x.dtype) for weight in weights], *rest)

    @staticmethod
    def gated(x: Tensor, gate: PackedWeight, up: PackedWeight, *rest: Any) -> Tensor:
        return products.gated(x, gate.dequantize(x.dtype), up.dequantize(x.dtype), *rest)

    @staticmethod
    def is_served(weight: PackedWeight) -> bool:
        return True


TWINS = Kernels(products, _Unpacked, norms.add_norm, rotary.rotary_write, static_attention)
"""The operations in torch."""


def of_triton() -> Kernels:
    """Return the operations as kernels in Triton. Raises: ImportError where Triton is not installed."""

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"hf_accel.kernels.triton.{name}")

    return Kernels(
        module("linear"),
        module("packed"),
        module("norm").add_norm,
        module("rotary").rotary_write,
        module("attention").decode_attention,
    )


class DeviceBlock:
    """One decoder layer, of the shape and weights of a native block, on the device where the weights are.

    Raises: ValueError naming what does not fit: dtypes, devices, or packed weights that no kernel reads.
    """

    def __init__(self, shape: BlockShape, weights: BlockWeights, kernels: Kernels | None = None) -> None:
        self.shape, self.weights = shape, weights
        self.kernels = of_triton() if kernels is None else kernels
        self.dtype, self.device = weights.input_norm.dtype, weights.input_norm.device
        self.is_half = weights.gate is None
        self._check()

    def _check(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"weights have dtype {self.dtype}; layers on devices take bfloat16, float16 and float32")
        for field in fields(self.weights):
            value = getattr(self.weights, field.name)
            weight = value.weight if isinstance(value, Projection) else value
            if weight is None:
                continue
            if isinstance(weight, PackedWeight):
                if not self.kernels.packed.is_served(weight):
                    raise ValueError(f"{field.name} is packed in {weight.scheme.bits} bits, which no kernel reads")
                weight = weight.codes
            elif weight.dtype != self.dtype:
                raise ValueError(f"{field.name} has dtype {weight.dtype}, the other weights {self.dtype}")
            elif weight.stride(-1) != 1:
                raise ValueError(f"{field.name} has strides {weight.stride()}; the last one must be 1")
            if weight.device != self.device:
                raise ValueError(f"{field.name} lies on {weight.device}, the other weights on {self.device}")
            bias = value.bias if isinstance(value, Projection) else None
            if bias is not None and (
                bias.dtype != self.dtype or bias.device != self.device or not bias.is_contiguous()
            ):
                raise ValueError(f"the bias of {field.name} has another dtype, device or layout than the weights")

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, layer: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the layer's output [B, T, E] for hidden [B, T, E]; of an attention half the residual and its norm.

        cos, sin [1 or B, T, R]; layer: a `hf_accel.core.calls.cache_layers.StaticLayer`, which T new keys and values
        are written to. No autograd.
        """
        shape, weights, kernels = self.shape, self.weights, self.kernels
        style = {"eps": shape.norm_eps, "style": shape.norm_style}
        size, kv_heads = shape.head_dim, shape.kv_heads
        _, normed = kernels.add_norm(hidden, None, weights.input_norm, **style)
        qkv = self._product(normed, weights.q, weights.k, weights.v)
        q_norm, k_norm = weights.q_norm, weights.k_norm
        if shape.norms_rows and q_norm is not None and k_norm is not None:
            parts = qkv.split((shape.heads * size, kv_heads * size, kv_heads * size), dim=-1)
            turned = [kernels.add_norm(part.contiguous(), None, factor, **style)[1]
                      for part, factor in zip(parts, (q_norm, k_norm))]  # fmt: skip
            qkv, q_norm, k_norm = torch.cat((*turned, parts[2]), dim=-1), None, None
        query = kernels.rotary_write(
            qkv, cos, sin, layer.keys, layer.values, layer.lengths, kv_heads=kv_heads, head_dim=size, bits=layer.bits,
            q_norm=q_norm, k_norm=k_norm, **style,
        )  # fmt: skip
        mixed = kernels.attention(
            query, layer.keys, layer.values, layer.lengths, layer.starts, scale=shape.scale, bits=layer.bits,
            head_dims=(size, size), window=layer.sliding_window, softcap=shape.softcap,
        )  # fmt: skip
        mixed = mixed.transpose(1, 2).flatten(2)
        hidden, normed = self._joined(mixed, weights.o, hidden, weights.attention_out_norm, weights.mlp_norm, style)
        if weights.gate is None or weights.up is None or weights.down is None:
            return hidden, normed
        inner = self._gated(normed, weights.gate, weights.up)
        return self._joined(inner, weights.down, hidden, weights.mlp_out_norm, None, style)[0]

    def _joined(
        self,
        x: Tensor,
        projection: Projection,
        residual: Tensor,
        inner_norm: Tensor | None,
        norm: Tensor | None,
        style: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return the residual with a product added, and its norm if there is one."""
        scale = self.shape.residual_scale
        if inner_norm is None:
            hidden = self._product(x, projection, residual=residual)
            return (hidden, hidden) if norm is None else self.kernels.add_norm(hidden, None, norm, **style)
        added = self._product(x, projection)
        return self.kernels.add_norm(residual, added, norm, inner_weight=inner_norm, residual_scale=scale, **style)

    def _product(self, x: Tensor, *projections: Projection, residual: Tensor | None = None) -> Tensor:
        """Return the products of x with all projections side by side, in one launch where one kernel reads them all."""
        if len({_kind(projection) for projection in projections}) > 1:
            return torch.cat([self._product(x, projection) for projection in projections], dim=-1)
        weights: Any = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections]
        family = self.kernels.packed if isinstance(weights[0], PackedWeight) else self.kernels.dense
        found: Tensor = family.linear(
            x, weights, biases, residual, 1.0 if residual is None else self.shape.residual_scale
        )
        return found

    def _gated(self, x: Tensor, gate: Projection, up: Projection) -> Tensor:
        if _kind(gate) != _kind(up):
            return products.activated(self._product(x, gate), self.shape.activation) * self._product(x, up)
        family = self.kernels.packed if isinstance(gate.weight, PackedWeight) else self.kernels.dense
        found: Tensor = family.gated(x, gate.weight, up.weight, self.shape.activation, [gate.bias, up.bias])
        return found


def _kind(projection: Projection) -> Any:
    """Return what projections have in common that one launch serves."""
    weight, has_bias = projection.weight, projection.bias is not None
    if isinstance(weight, PackedWeight):
        return weight.scheme, weight.scales.dtype, weight.scales.shape[1], has_bias
    return has_bias
