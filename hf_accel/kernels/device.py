"""A decoder layer over a static cache in about nine launches, of kernels in Triton or of their twins in torch.

Nothing depends on what only the host knows: a step made of it can be captured as a graph. Cost: the layer's weights and
what the cache is filled with are read once, activations a few times.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native.block_weights import BlockShape, BlockWeights, Norm, Projection, heads_in_order
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import norms, products, rotary
from hf_accel.ops.static_attention import static_attention

MAX_ROWS = 32
MAX_PACKED_ROWS = 8
"""Rows up to which products with packed weights need no tensor cores; above, only timing tells what is fast."""
MAX_TOKENS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
_STYLES = {"rms": "llama", "rms_unit": "gemma"}  # kinds of norms -> their names in the operations


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

    Raises: ValueError naming what does not fit: parts that the layers of Llama and Gemma do not have, dtypes, devices,
    or packed weights that no kernel reads.
    """

    def __init__(self, shape: BlockShape, weights: BlockWeights, kernels: Kernels | None = None) -> None:
        self.shape, self.weights = shape, weights
        self.kernels = of_triton() if kernels is None else kernels
        self._check_parts()
        norm = weights.input_norm
        if norm is None or norm.weight is None:
            raise ValueError("layers on devices do not have attention without a norm before it")
        self.dtype, self.device = norm.weight.dtype, norm.weight.device
        self._norm, self._style = norm.weight, {"eps": norm.eps, "style": _STYLES[norm.kind]}
        self.is_half = shape.part == "half"
        self._check_tensors()
        parts = weights.products.values()
        is_packed = any(isinstance(part.weight, PackedWeight) for part in parts)
        self.max_rows = MAX_PACKED_ROWS if is_packed else MAX_ROWS

    def _check_parts(self) -> None:
        shape, weights = self.shape, self.weights
        rows = sum(projection.weight.shape[0] for projection in weights.projections)
        places = heads_in_order(shape.heads, shape.kv_heads, shape.head_dim)
        norms = list(weights.norms.values())
        q_norm, k_norm = weights.q_norm, weights.k_norm
        for fits, found in (
            (shape.part != "attention", "attention without the layer"),
            (not shape.is_parallel, "parallel parts"),
            ({name: getattr(shape, name) for name in "qkv"} == places, "q, k and v in another order"),
            (rows == (shape.heads + 2 * shape.kv_heads) * shape.head_dim, "projections of more than q, k and v"),
            (len(weights.projections) <= 3, "more than three projections"),
            (shape.gate is None and weights.sinks is None and weights.slopes is None, "a gate, sinks or slopes"),
            (shape.rotary == "halves" and shape.rotary_size is None, f"rotary of {shape.rotary}"),
            (not shape.rotates_once and not shape.norms_after_rotary, "a rotary of other roundings or before norms"),
            (shape.norm_extent != "heads" and weights.v_norm is None, "norms of values or of each head"),
            ((q_norm is None) == (k_norm is None), "a norm of queries or keys alone"),
            (shape.out_scale == 1.0, "a scale of its result"),
            (shape.activation in _ACTIVATIONS, f"the activation {shape.activation}"),
            (shape.part == "half" or weights.gate is not None, "a feed-forward part without a gate"),
            (weights.mlp_norm is not None, "a feed-forward part without a norm before it"),
            (all(norm.kind in _STYLES and norm.weight is not None for norm in norms), "norms of other kinds"),
            (len({(norm.kind, norm.eps) for norm in norms}) == 1, "norms that differ in kind or eps"),
        ):
            if not fits:
                raise ValueError(f"layers on devices do not have {found}")

    def _check_tensors(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"weights have dtype {self.dtype}; layers on devices take bfloat16, float16 and float32")
        weights = {name: product.weight for name, product in self.weights.products.items()}
        factors = {name: norm.weight for name, norm in self.weights.norms.items()}
        for name, weight in (weights | factors).items():
            if weight is None:
                continue
            if isinstance(weight, PackedWeight):
                if not self.kernels.packed.is_served(weight):
                    raise ValueError(f"{name} is packed in {weight.scheme.bits} bits, which no kernel reads")
                weight = weight.codes
            elif weight.dtype != self.dtype:
                raise ValueError(f"{name} has dtype {weight.dtype}, the other weights {self.dtype}")
            elif weight.stride(-1) != 1:
                raise ValueError(f"{name} has strides {weight.stride()}; the last one must be 1")
            if weight.device != self.device:
                raise ValueError(f"{name} lies on {weight.device}, the other weights on {self.device}")
        for name, product in self.weights.products.items():
            bias = product.bias
            if bias is not None and (
                bias.dtype != self.dtype or bias.device != self.device or not bias.is_contiguous()
            ):
                raise ValueError(f"the bias of {name} has another dtype, device or layout than the weights")

    @staticmethod
    def _factor(norm: Norm | None) -> Tensor | None:
        return None if norm is None else norm.weight

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, layer: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the layer's output [B, T, E] for hidden [B, T, E]; of an attention half the residual and its norm.

        cos, sin [1 or B, T, R]; layer: a `hf_accel.core.calls.cache_layers.StaticLayer`, which T new keys and values
        are written to. No autograd.
        """
        shape, weights, kernels, style = self.shape, self.weights, self.kernels, self._style
        size, kv_heads = shape.head_dim, shape.kv_heads
        _, normed = kernels.add_norm(hidden, None, self._norm, **style)
        qkv = self._product(normed, *weights.projections)
        q_norm, k_norm = self._factor(weights.q_norm), self._factor(weights.k_norm)
        if shape.norm_extent == "row" and q_norm is not None and k_norm is not None:
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
        inner_norm, norm = self._factor(weights.attention_out_norm), self._factor(weights.mlp_norm)
        hidden, normed = self._joined(mixed, weights.o, hidden, inner_norm, norm, style)
        if weights.gate is None or weights.up is None or weights.down is None:
            return hidden, normed
        inner = self._gated(normed, weights.gate, weights.up)
        return self._joined(inner, weights.down, hidden, self._factor(weights.mlp_out_norm), None, style)[0]

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
