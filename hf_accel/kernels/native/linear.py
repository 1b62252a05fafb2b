"""Products of activation rows with weights as they lie in memory; few rows cost one read of the weight.

fp32 accumulation, one rounding at the end; relative error not above ATen's product in the same dtype. With
AVX512-BF16 subnormal bf16 values count as zero (the dot product instruction does so).
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels.native import library as _library

FEW_ROWS = 16
"""Up to so many activation rows a product takes about as long as reading the weight."""
MAX_ROWS = 32
"""Activation rows of one call of `linear_group`, or of a transposed weight; up to so many a decoder layer has a way of
its own, which serves every kind of mask."""
MAX_GROUP = 4
"""Weights that can share one activation in `linear_group`."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_TRANSPOSED = 1 << 8
_GROUPS = [struct.Struct("=Qqqqqq" + "QQQqq" * count) for count in range(MAX_GROUP + 1)]

_is_compiling = torch.compiler.is_compiling
_get_num_threads = torch.get_num_threads
_function: Any = None  # set at the first call; a module global is the cheapest lookup
_group_function: Any = None


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    # one frame, no slicing of shapes where it can be avoided: a small model makes two hundred of these calls per token
    global _function
    if _function is None:
        _function = _library.library().hfa_linear
    if not x.is_contiguous():
        x = x.contiguous()
    shape = x.shape
    flags = DTYPE_CODES[x.dtype] | _get_num_threads() << 16
    if transposed:
        n = weight.shape[1]
        flags |= _TRANSPOSED
    else:
        n = weight.shape[0]
    if len(shape) == 3:
        batch, tokens, k = shape
        rows = batch * tokens
        y = x.new_empty((batch, tokens, n))
    else:
        k = shape[-1]
        rows = x.numel() // k
        y = x.new_empty((*shape[:-1], n))
    bias_pointer = None if bias is None else bias.data_ptr()
    if _function(x.data_ptr(), weight.data_ptr(), bias_pointer, y.data_ptr(), rows, k, n, weight.stride(0), flags):
        raise ValueError(
            f"native linear takes 1 row or more, transposed up to {MAX_ROWS}, got {rows} of {k} for a weight "
            f"{tuple(weight.shape)}"
        )
    return y


@torch.library.custom_op("hf_accel::linear", mutates_args=(), device_types="cpu")
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return _call(x, weight, bias, transposed)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """x W^T + bias, or x W + bias with `transposed` (GPT-2's Conv1D).

    x [..., K] with any number of rows, with `transposed` at most MAX_ROWS; weight [N, K] (transposed: [K, N]) with
    stride(-1) == 1, possibly a slice of a larger one; bias [N]; all on the CPU in one dtype of DTYPES, which the caller
    guarantees. No autograd.
    While tracing, the call is the operator `hf_accel::linear`; otherwise it goes straight into C.
    Raises: ValueError for a number of rows it does not serve.
    """
    if _is_compiling():
        return _operator(x, weight, bias, transposed)
    return _call(x, weight, bias, transposed)


def best_rows(dtype: torch.dtype) -> int | None:
    """Return up to how many rows products are made here rather than by ATen; None: whatever their number.

    ATen multiplies bf16 and fp16 fast only where the CPU has instructions for them. Elsewhere its products of many rows
    take several times as long as ours (6 times, on Zen 3), which a short trial shows: some 30 ms, once per process.
    """
    if dtype.itemsize != 2:
        return FEW_ROWS
    return None if _is_faster_than_aten(dtype, _library.status().isa) else FEW_ROWS


@functools.cache
def _is_faster_than_aten(dtype: torch.dtype, isa: str) -> bool:
    x, weight = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            product(x, weight)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(linear) < 0.8 * seconds(functional.linear)


def linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """`[linear(x, w, b) ...]` for up to MAX_GROUP weights that share x, in one parallel region.

    Raises: ValueError for a number of rows or weights it does not serve.
    """
    if biases is None:
        biases = (None,) * len(weights)
    if _is_compiling():
        return [_operator(x, weight, bias, False) for weight, bias in zip(weights, biases, strict=True)]
    global _group_function
    if _group_function is None:
        _group_function = _library.library().hfa_linear_group
    if not x.is_contiguous():
        x = x.contiguous()
    *lead, k = x.shape
    rows = x.numel() // k
    count = len(weights)
    outputs: list[Tensor] = []
    fields: list[int] = []
    for weight, bias in zip(weights, biases):
        n = weight.shape[0]
        y = x.new_empty((*lead, n))
        outputs.append(y)
        bias_pointer = 0 if bias is None else bias.data_ptr()
        fields += (weight.data_ptr(), bias_pointer, y.data_ptr(), weight.stride(0), n)
    if count > MAX_GROUP or _group_function(
        _GROUPS[count].pack(x.data_ptr(), DTYPE_CODES[x.dtype], rows, k, _get_num_threads(), count, *fields)
    ):
        raise ValueError(
            f"native linear_group takes 1 to {MAX_ROWS} rows and {MAX_GROUP} weights, got {rows} and {count}"
        )
    return outputs
