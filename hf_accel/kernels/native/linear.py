"""Products of 1 to 16 activation rows with weights as they lie in memory; cost: one read of the weight.

fp32 accumulation, one rounding at the end; relative error not above ATen's product in the same dtype. With
AVX512-BF16 subnormal bf16 values count as zero (the dot product instruction does so).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library

MAX_ROWS = 16
"""Activation rows of one call: above, a matrix-matrix product is the better tool."""
MAX_GROUP = 4
"""Weights that can share one activation in `linear_group`."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_TRANSPOSED = 1 << 8
_GROUP = struct.Struct("=Qqqqq" + "QQqqq" * MAX_GROUP + "Q" * MAX_GROUP)

_is_compiling = torch.compiler.is_compiling
_get_num_threads = torch.get_num_threads
_empty = torch.empty
_function: Any = None


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    global _function
    if _function is None:
        _function = _library.library().hfa_linear
    if not x.is_contiguous():
        x = x.contiguous()
    shape = x.shape
    k = shape[-1]
    dtype = x.dtype
    if transposed:
        n = weight.shape[1]
        flags = DTYPE_CODES[dtype] | _TRANSPOSED | _get_num_threads() << 16
    else:
        n = weight.shape[0]
        flags = DTYPE_CODES[dtype] | _get_num_threads() << 16
    y = _empty((*shape[:-1], n), dtype=dtype)
    rows = x.numel() // k
    if _function(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows,
        k,
        n,
        weight.stride(0),
        flags,
    ):
        raise ValueError(f"native linear takes 1 to {MAX_ROWS} rows, got {rows} of {k} for a weight {tuple(weight.shape)}")
    return y


@torch.library.custom_op("hf_accel::linear", mutates_args=(), device_types="cpu")
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return _call(x, weight, bias, transposed)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """x W^T + bias, or x W + bias with `transposed` (GPT-2's Conv1D).

    x [..., K] with at most MAX_ROWS rows in all; weight [N, K] (transposed: [K, N]) with stride(-1) == 1, possibly a
    slice of a larger one; bias [N]; all on the CPU in one dtype of DTYPES, which the caller guarantees. No autograd.
    While tracing, the call is the operator `hf_accel::linear`; otherwise it goes straight into C.
    Raises: ValueError for a number of rows it does not serve.
    """
    if _is_compiling():
        return _operator(x, weight, bias, transposed)
    return _call(x, weight, bias, transposed)


def linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """`[linear(x, w, b) ...]` for up to MAX_GROUP weights that share x, in one parallel region.

    Raises: ValueError for a number of rows or weights it does not serve.
    """
    if biases is None:
        biases = (None,) * len(weights)
    if _is_compiling():
        return [_operator(x, weight, bias, False) for weight, bias in zip(weights, biases, strict=True)]
    x = x.contiguous()
    k = x.shape[-1]
    outputs = [_empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype) for weight in weights]
    missing = MAX_GROUP - len(weights)
    fields: list[int] = []
    for weight, bias in zip(weights, biases, strict=True):
        fields += (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.stride(0), weight.shape[0], k)
    rows = x.numel() // k
    if missing < 0 or _library.library().hfa_linear_group(
        _GROUP.pack(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            rows,
            _get_num_threads(),
            len(weights),
            *fields,
            *(0,) * (5 * missing),
            *(output.data_ptr() for output in outputs),
            *(0,) * missing,
        )
    ):
        raise ValueError(f"native linear_group takes 1 to {MAX_ROWS} rows and {MAX_GROUP} weights, got {rows} and {len(weights)}")
    return outputs
