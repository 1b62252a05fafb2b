"""A whole pre-norm gated decoder layer in one native call, for at most 32 rows; cost: its weights and cache read once.

Serves the layers of Llama, Mistral, Qwen2, Qwen3, Phi3, Gemma2 and Gemma3: norm, q/k/v, rotary, cache write,
attention, output, residual, norm, gated feed-forward, residual. Every tensor the eager PyTorch layer materialises is
rounded to the dtype at the same point.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.attend import MAX_HEAD_DIM
from hf_accel.kernels.native.linear import DTYPE_CODES, MAX_ROWS
from hf_accel.kernels.packed import FORMATS, MATRIX, PackedWeight

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
NORM_STYLES = {"llama": 0, "gemma": 1}

_HEAD = struct.Struct("=8q3d")
_NORMS = struct.Struct("=6Q")
_CALL = struct.Struct("=7Q19qQq")
_STRANGE = 1  # see hfa_block_forward
_get_num_threads = torch.get_num_threads
_empty_like = torch.empty_like


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
    `softcap` (None: off) then maps them to cap * tanh(score / cap).
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


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """Tensors of a layer, all of one dtype on the CPU; norm weights [E], q_norm and k_norm [D]."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection
    up: Projection
    down: Projection
    input_norm: Tensor
    mlp_norm: Tensor
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
    return {**products, **norms, "q_norm": (d,), "k_norm": (d,)}


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


def _check(shape: BlockShape, weights: BlockWeights) -> torch.dtype:
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


def _matrix(projection: Projection) -> bytes:
    weight, bias = projection.weight, projection.bias
    if not isinstance(weight, Tensor):
        return weight.matrix(bias)
    pointer = 0 if bias is None else bias.data_ptr()
    return MATRIX.pack(weight.data_ptr(), pointer, weight.stride(0), *weight.shape, 0, 0, FORMATS[None], 0)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeBlock:
    """One decoder layer; holds its tensors, and their addresses as C wants them.

    A deep copy or an unpickled block is built anew from the copied tensors. Raises: ValueError naming what does not
    fit (dtypes, strides, shapes, head_dim above 256); RuntimeError where the native library is not available.
    """

    def __init__(self, shape: BlockShape, weights: BlockWeights) -> None:
        self.shape = shape
        self.weights = weights
        self.dtype = _check(shape, weights)
        self._function: Any = _library.library().hfa_block_forward
        w = weights
        matrices = (w.q, w.k, w.v, w.o, w.gate, w.up, w.down)
        norms = (w.input_norm, w.attention_out_norm, w.mlp_norm, w.mlp_out_norm, w.q_norm, w.k_norm)
        head = _HEAD.pack(
            DTYPE_CODES[self.dtype],
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.inner,
            ACTIVATIONS[shape.activation],
            NORM_STYLES[shape.norm_style],
            shape.norm_eps,
            shape.scale,
            shape.softcap or 0.0,
        )
        self._packed = b"".join((head, *map(_matrix, matrices), _NORMS.pack(*map(_pointer, norms))))

    def __reduce__(self) -> tuple[type[NativeBlock], tuple[BlockShape, BlockWeights]]:
        return NativeBlock, (self.shape, self.weights)

    def tensors(self) -> list[Tensor]:
        """Every tensor the block reads; a caller that replaces one of them must build a new block."""
        found: list[Tensor | None] = []
        for field in fields(self.weights):
            value = getattr(self.weights, field.name)
            if isinstance(value, Projection):
                found += [value.weight if isinstance(value.weight, Tensor) else value.weight.codes, value.bias]
            else:
                found.append(value)
        return [tensor for tensor in found if tensor is not None]

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        past: int,
        first: int = 0,
        mask: Tensor | None = None,
        row_past: Tensor | None = None,
        bits: int | None = None,
    ) -> Tensor | None:
        """The layer's output [B, T, E] for hidden [B, T, E] contiguous, B * T <= MAX_ROWS.

        cos, sin [1 or B, T, rotary] in the dtype of the weights; keys, values: the buffers [B, G, C, D] with the last
        dimension contiguous and C >= past + T; positions past..past+T-1 are written, first..past+T-1 attended to
        (causally without a mask). mask: bool (true: visible) or additive in the dtype, [1 or B, 1, T, past+T-first].
        A query that a bool mask hides everything from gets zeros from the attention. No autograd.
        row_past: int64 [B] on the CPU, contiguous; sequence b is then at position row_past[b] instead of `past`, with
        first <= row_past[b] <= past. It writes and attends to nothing from row_past[b]+T on, whatever the mask says.
        bits: None, or 8 or 4 where keys and values are rows of codes, uint8, see `hf_accel.ops.cached`.
        No sequence changes another's result: to the last bit it is the one of that sequence alone, save on AMX, where
        a single row has its products summed in another order.
        None: a score of the attention is not finite, so that PyTorch's result depends on which attention runs.
        Raises: ValueError when sizes are out of range.
        """
        batch, tokens, _ = hidden.shape
        key_stride = keys.stride()
        value_stride = values.stride()
        cos_stride = cos.stride()
        sin_stride = sin.stride()
        if mask is None:
            mask_pointer = mask_kind = mask_stride_b = mask_stride_t = 0
        else:
            mask_pointer = mask.data_ptr()
            mask_kind = 1 if mask.dtype is torch.bool else 2
            mask_stride_b = mask.stride(0) if mask.shape[0] > 1 else 0
            mask_stride_t = mask.stride(2)
        many = cos.shape[0] > 1
        out = _empty_like(hidden)
        call = _CALL.pack(
            hidden.data_ptr(),
            out.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            mask_pointer,
            batch,
            tokens,
            past,
            first,
            _get_num_threads(),
            cos.shape[-1],
            cos_stride[0] if many else 0,
            cos_stride[1],
            sin_stride[0] if many else 0,
            sin_stride[1],
            key_stride[0],
            key_stride[1],
            key_stride[2],
            value_stride[0],
            value_stride[1],
            value_stride[2],
            mask_kind,
            mask_stride_b,
            mask_stride_t,
            0 if row_past is None else row_past.data_ptr(),
            FORMATS[bits],
        )
        if row_past is not None and (
            row_past.dtype is not torch.int64 or row_past.shape != (batch,) or not row_past.is_contiguous()
        ):
            raise ValueError(f"row_past must be contiguous int64 [{batch}], got {row_past.dtype} {[*row_past.shape]}")
        status = -1 if past + tokens > keys.shape[2] else self._function(self._packed, call)
        if status == _STRANGE:
            return None
        if status:
            raise ValueError(
                f"native block takes 1 to {MAX_ROWS} rows and a buffer that holds them, got {batch} x {tokens} rows "
                f"at position {past} of a buffer of {keys.shape[2]} positions (first visible: {first}"
                f"{'' if row_past is None else f'; by row: {row_past.tolist()}, each from {first} to {past}'})"
            )
        return out
