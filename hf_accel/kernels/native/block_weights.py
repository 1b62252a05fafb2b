"""What a decoder layer consists of for a native call, sizes and tensors, and the check that the kernels can take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_accel.kernels.native.attend import MAX_HEAD_DIM
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.kernels.weights import PackedWeight

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
NORM_STYLES = {"llama": 0, "gemma": 1}


@dataclass(frozen=True)
class Projection:
    """One linear map: weight [N, K], possibly a slice of rows of a fused or packed weight; bias [N] or None."""

    weight: Tensor | PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes and constants of a layer: E, H, G, D and the inner size of the feed-forward part.

    `activation` is one of silu, gelu_tanh, gelu (erf), relu. `norm_style` "llama" multiplies the rounded normalised
    value by the weight; "gemma" multiplies by 1 + weight in fp32 and rounds once. `scale` multiplies scores;
    `softcap` (None: off) then maps them to cap * tanh(score / cap). norms_rows: q_norm and k_norm are over all heads of
    a row. What a part of the layer gives is multiplied by `residual_scale` before it joins the residual.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: str
    norm_eps: float
    norm_style: Literal["llama", "gemma"]
    scale: float
    softcap: float | None = None
    norms_rows: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """Tensors of a layer, all of one dtype on the CPU; norm weights [E], q_norm and k_norm [D] or of all heads.

    Without gate, up and down it is the attention half of a layer, whose feed-forward part is computed elsewhere.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    input_norm: Tensor
    mlp_norm: Tensor
    gate: Projection | None = None
    up: Projection | None = None
    down: Projection | None = None
    attention_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def _sizes(shape: BlockShape) -> dict[str, tuple[int, ...]]:
    """Name of each weight -> the shape it must have."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    e, i, d = shape.hidden, shape.inner, shape.head_dim
    products = {"q": (q, e), "k": (kv, e), "v": (kv, e), "o": (e, q), "gate": (i, e), "up": (i, e), "down": (e, i)}
    norms = dict.fromkeys(("input_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm"), (e,))
    q_norm, k_norm = (q, kv) if shape.norms_rows else (d, d)
    return {**products, **norms, "q_norm": (q_norm,), "k_norm": (k_norm,)}


def _check_tensor(name: str, tensor: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} lies on {tensor.device}; the native block runs on the CPU")
    if tensor.dtype != dtype:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, the other weights {dtype}: the native block takes one dtype"
        )
    if tuple(tensor.shape) != size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the block's sizes ask for {size}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; the last one must be 1")
    _check_memory(name, tensor)


def _check_memory(name: str, tensor: Tensor) -> None:
    last = tensor.storage_offset() + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    if not tensor.data_ptr() or (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"the memory of {name} has been given up")


def checked_dtype(shape: BlockShape, weights: BlockWeights) -> torch.dtype:
    """Return the dtype of the weights. Raises: ValueError naming what the native block does not take."""
    dtype = weights.input_norm.dtype
    if dtype not in DTYPE_CODES:
        raise ValueError(f"weights have dtype {dtype}; the native block takes bfloat16, float16 and float32")
    if shape.activation not in ACTIVATIONS:
        raise ValueError(f"activation {shape.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if shape.norm_style not in NORM_STYLES:
        raise ValueError(f"norm_style {shape.norm_style!r} is not one of {', '.join(NORM_STYLES)}")
    if not 1 <= shape.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {shape.head_dim}; the native block takes 1 to {MAX_HEAD_DIM}")
    if shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        raise ValueError(f"heads ({shape.heads}) must be a multiple of kv_heads ({shape.kv_heads})")
    if shape.softcap is not None and not shape.softcap > 0:
        raise ValueError(f"softcap is {shape.softcap}; it must be positive, or None for no soft cap")
    if len({value is None for value in (weights.gate, weights.up, weights.down)}) > 1:
        raise ValueError("a block has gate, up and down, or none of them")
    for name, size in _sizes(shape).items():
        value = getattr(weights, name)
        if isinstance(value, Projection):
            if isinstance(value.weight, Tensor):
                _check_tensor(f"{name}.weight", value.weight, size, dtype)
            elif tuple(value.weight.shape) != size:
                raise ValueError(f"{name}.weight has shape {tuple(value.weight.shape)}; the block asks for {size}")
            else:
                value.weight.check()
            if value.bias is not None:
                _check_tensor(f"{name}.bias", value.bias, size[:1], dtype)
        elif value is not None:
            _check_tensor(name, value, size, dtype)
    return dtype
