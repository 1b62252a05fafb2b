"""A whole decoder layer in one native call, or its attention; cost: its weights read once per 128 rows.

Norms, projections, rotary, cache write, attention, output, residuals, feed-forward part, in the order and with the
constants that the layer's description says. Every tensor the eager PyTorch layer materialises is rounded to the dtype
at the same point.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.block_checks import checked_dtype, is_transposed
from hf_accel.kernels.native.block_weights import (
    ACTIVATIONS,
    MAX_PROJECTIONS,
    NORM_EXTENTS,
    NORM_KINDS,
    PARTS,
    ROTARIES,
    BlockShape,
    BlockWeights,
    Heads,
    Norm,
    Projection,
)
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.kernels.weights import FORMATS, MATRIX, dense_matrix, transposed_matrix

_HEAD = struct.Struct("=16q4d")
_HEADS = struct.Struct("=3q")
_NORM = struct.Struct("=2Qqd")
_LAST = struct.Struct("=2Q")
_CALL = struct.Struct("=7Q19qQqQq2Q")
_NO_MATRIX = bytes(MATRIX.size)
_NO_HEADS = _HEADS.pack(-1, 0, 0)
_NO_NORM = bytes(_NORM.size)
_NO_STRIDES = (0, 0, 0)
_NO_RESULT = 1  # see hfa_block_forward
ROW_FIELDS = 8  # of hfa_row, 8 bytes each
_get_num_threads = torch.get_num_threads
_empty_like = torch.empty_like


def packed_matrix(projection: Projection | None) -> bytes:
    """Return its `hfa_matrix`."""
    if projection is None:
        return _NO_MATRIX
    weight, bias = projection.weight, projection.bias
    if not isinstance(weight, Tensor):
        return weight.matrix(bias)
    return transposed_matrix(weight, bias) if is_transposed(weight) else dense_matrix(weight, bias)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _heads(heads: Heads | None) -> bytes:
    return _NO_HEADS if heads is None else _HEADS.pack(heads.start, heads.stride, heads.step)


def packed_norm(norm: Norm | None) -> bytes:
    """Return its `hfa_norm`."""
    if norm is None:
        return _NO_NORM
    return _NORM.pack(_pointer(norm.weight), _pointer(norm.bias), NORM_KINDS[norm.kind], norm.eps)


def _packed(shape: BlockShape, weights: BlockWeights, dtype: torch.dtype) -> bytes:
    """Return `hfa_block` of csrc/native.h."""
    w, sinks = weights, weights.sinks
    head = _HEAD.pack(
        DTYPE_CODES[dtype],
        PARTS[shape.part],
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.inner,
        ACTIVATIONS[shape.activation],
        shape.is_parallel,
        NORM_EXTENTS[shape.norm_extent],
        shape.norms_after_rotary,
        ROTARIES[shape.rotary],
        shape.rotary_size or 0,
        shape.rotates_once,
        sinks is not None and sinks.dtype == torch.float32,
        len(w.projections),
        shape.scale,
        shape.softcap or 0.0,
        shape.residual_scale,
        shape.out_scale,
    )
    projections = (*w.projections, *[None] * (MAX_PROJECTIONS - len(w.projections)))
    matrices = (*projections, w.o, w.gate, w.up, w.down)
    norms = (w.input_norm, w.attention_out_norm, w.mlp_norm, w.mlp_out_norm, w.q_norm, w.k_norm, w.v_norm)
    places = (shape.q, shape.k, shape.v, shape.gate)
    parts = (*map(_heads, places), *map(packed_matrix, matrices), *map(packed_norm, norms))
    return b"".join((head, *parts, _LAST.pack(_pointer(sinks), _pointer(w.slopes))))


class NativeBlock:
    """One decoder layer; holds its tensors, and their addresses as C wants them.

    A deep copy or an unpickled block is built anew from the copied tensors. Raises: ValueError naming what does not
    fit (dtypes, strides, shapes, head_dim above 256); RuntimeError where the native library is not available.
    """

    def __init__(self, shape: BlockShape, weights: BlockWeights) -> None:
        self.shape = shape
        self.weights = weights
        self.dtype = checked_dtype(shape, weights)
        self._function: Any = _library.library().hfa_block_forward
        self.is_half = shape.part == "half"
        self._width = weights.o.weight.shape[0]
        self.packed = _packed(shape, weights, self.dtype)

    def __reduce__(self) -> tuple[type[NativeBlock], tuple[BlockShape, BlockWeights]]:
        return NativeBlock, (self.shape, self.weights)

    def tensors(self) -> list[Tensor]:
        """Every tensor the block reads; a caller that replaces one of them must build a new block."""
        return list(self.weights.tensors().values())

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        keys: Tensor,
        values: Tensor,
        past: int,
        first: int = 0,
        mask: Tensor | None = None,
        row_past: Tensor | None = None,
        bits: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """The layer's output [B, T, E] for hidden [B, T, E] contiguous; memory for at most 128 rows at a time.

        cos, sin [1 or B, T, R] in the dtype of the weights or in fp32, or None without rotary; keys, values: the
        buffers [B, G, C, D] with the last dimension contiguous and C >= past + T; positions past..past+T-1 are written,
        first..past+T-1 attended to (causally without a mask). mask: bool (true: visible) or additive in the dtype,
        [1 or B, 1, T, past+T-first].
        A query that a bool mask hides everything from gets zeros from the attention. No autograd.
        row_past: int64 [B] on the CPU, contiguous; sequence b is then at position row_past[b] instead of `past`, with
        first <= row_past[b] <= past. It writes and attends to nothing from row_past[b]+T on, whatever the mask says.
        bits: None, or 8 or 4 where keys and values are rows of codes, uint8, see `hf_accel.ops.cached`.
        rows: int64 [B, 8] on the CPU, contiguous, without mask and row_past: sequence b lies in buffers of its own with
        room for T more. Its row says the addresses of its keys and values [G, C, D], their strides by G and by C, its
        own `past` and `first`; those of the call are the largest and the smallest.
        No sequence changes another's result: to the last bit it is the one of that sequence alone, save that, on AMX, a
        single row and, without `rows`, more than MAX_ROWS rows have their products summed in other orders.
        Of an attention half: the residual and what the feed-forward part reads, [B, T, E] each; of attention alone the
        product of o, [B, T, its rows].
        None: a score of the attention is not finite, so that PyTorch's result depends on which attention runs; or there
        are more than MAX_ROWS rows, several of a sequence, with an additive mask, with row_past, or with a mask that
        shows a row what a later pass computes.
        Raises: ValueError when sizes are out of range.
        """
        batch, tokens, width = hidden.shape
        key_stride = keys.stride()
        value_stride = values.stride()
        if cos is not None and sin is not None:
            cos_stride = cos.stride()
            sin_stride = sin.stride()
            angles, many, cos_pointer, sin_pointer = (
                cos.shape[-1],
                int(cos.shape[0] > 1),
                cos.data_ptr(),
                sin.data_ptr(),
            )
        else:
            cos_stride = sin_stride = _NO_STRIDES
            angles = many = cos_pointer = sin_pointer = 0
        if mask is None:
            mask_pointer = mask_kind = mask_stride_b = mask_stride_t = 0
        else:
            mask_pointer = mask.data_ptr()
            mask_kind = 1 if mask.dtype is torch.bool else 2
            mask_stride_b = mask.stride(0) if mask.shape[0] > 1 else 0
            mask_stride_t = mask.stride(2)
        out = _empty_like(hidden) if self._width == width else hidden.new_empty(batch, tokens, self._width)
        normed = _empty_like(hidden) if self.is_half else None
        call = _CALL.pack(
            hidden.data_ptr(),
            out.data_ptr(),
            cos_pointer,
            sin_pointer,
            keys.data_ptr(),
            values.data_ptr(),
            mask_pointer,
            batch,
            tokens,
            past,
            first,
            _get_num_threads(),
            angles,
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
            0 if normed is None else normed.data_ptr(),
            int(cos is not None and cos.dtype is torch.float32),
            0 if rows is None else rows.data_ptr(),
            0,
        )
        if row_past is not None and (
            row_past.dtype is not torch.int64 or row_past.shape != (batch,) or not row_past.is_contiguous()
        ):
            raise ValueError(f"row_past must be contiguous int64 [{batch}], got {row_past.dtype} {[*row_past.shape]}")
        if rows is not None and (
            rows.dtype is not torch.int64 or rows.shape != (batch, ROW_FIELDS) or not rows.is_contiguous()
        ):
            raise ValueError(f"rows must be contiguous int64 [{batch}, 8], got {rows.dtype} {[*rows.shape]}")
        is_short = past + tokens > keys.shape[2] and rows is None
        status = -1 if is_short else self._function(self.packed, call)
        if status == _NO_RESULT:
            return None
        if status:
            raise ValueError(
                f"native block takes 1 row or more and a buffer that holds them, got {batch} x {tokens} rows "
                f"at position {past} of a buffer of {keys.shape[2]} positions, with {angles} angles "
                f"(first visible: {first}"
                f"{'' if row_past is None else f'; by row: {row_past.tolist()}, each from {first} to {past}'}"
                f"{'' if rows is None else f'; buffers by row, past and first: {rows[:, 6:].tolist()}, no mask'})"
            )
        return out if normed is None else (out, normed)
