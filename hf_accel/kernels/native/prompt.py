"""Attention of the many queries of a prompt, tile by tile; memory: the output and some tiles per thread."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.attend import MAX_HEAD_DIM, _row
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.kernels.weights import FORMATS
from hf_accel.ops.attention import AttentionState

_PROMPT = struct.Struct("=9Q26q2d")


def prompt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dims: tuple[int, int],
    *,
    scale: float,
    softcap: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    bits: int | None = None,
) -> Tensor:
    """Return attention [B, T, H, Dv] of queries over keys and values, in the dtype of the queries.

    Args:
        query: [B, H, T, D] of bf16, fp16 or fp32, last dimension contiguous.
        keys, values: [B, G, S, ...] of the same dtype, or rows of codes (uint8) of `bits` 8 or 4.
        head_dims: D of keys, D of values; at most 256.
        is_causal: query t sees no column beyond S - T + t.
        window: query t sees only columns beyond S - T + t - window.
        starts: int64 [B], the first column of each row that is not left padding; None: 0.
        mask: bool [1 or B, 1 or H, T, S], true: visible, beside all of these.
        sinks: fp32 [H], one more score per head that takes part in the softmax and has no value.

    A query that sees nothing is given zeros.

    Raises:
        ValueError: sizes or types that do not fit one another.
    """
    _check(query, keys, values, head_dims, window, starts, mask, sinks, bits)
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, head_dims[1])
    past = keys.shape[2] - tokens
    _run(
        query, keys, values, head_dims, output, None, past, scale, softcap, is_causal, window, starts, mask, sinks, bits
    )
    return output


def prompt_state(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dims: tuple[int, int],
    *,
    past: int,
    scale: float,
    softcap: float | None = None,
    is_causal: bool = True,
    mask: Tensor | None = None,
    bits: int | None = None,
) -> AttentionState:
    """Return attention as above over a part of a cache, to be merged with that over others.

    past: the column of this part that query 0 stands at; it may lie outside.
    """
    _check(query, keys, values, head_dims, None, None, mask, None, bits)
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, head_dims[1], dtype=torch.float32)
    totals = query.new_empty(batch, tokens, heads, dtype=torch.float32)
    _run(query, keys, values, head_dims, output, totals, past, scale, softcap, is_causal, None, None, mask, None, bits)
    totals = totals.transpose(1, 2)
    return AttentionState(output.transpose(1, 2), totals, (totals != -torch.inf).float())


def _run(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dims: tuple[int, int],
    output: Tensor,
    totals: Tensor | None,
    past: int,
    scale: float,
    softcap: float | None,
    is_causal: bool,
    window: int | None,
    starts: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    bits: int | None,
) -> None:
    batch, heads, tokens, _ = query.shape
    mask_strides = [0, 0, 0]
    if mask is not None:
        mask_strides = [stride if n > 1 else 0 for stride, n in zip(mask.stride()[:3], mask.shape[:3], strict=True)]
    starts, sinks = (None if given is None else given.contiguous() for given in (starts, sinks))
    pointers = (query, keys, values, mask, output, totals, starts, sinks, None)  # None: slopes, which only layers have
    call = _PROMPT.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
        DTYPE_CODES[query.dtype], FORMATS[bits], batch, tokens, heads, keys.shape[1], *head_dims, keys.shape[2], past,
        is_causal, window or 0, totals is not None, torch.get_num_threads(),
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *mask_strides, scale, softcap or 0.0,
    )  # fmt: skip
    if _library.library().hfa_prompt(call):
        raise ValueError(f"native attention of {heads} heads over {keys.shape[1]} of sizes {head_dims} found no memory")


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dims: tuple[int, int],
    window: int | None,
    starts: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    bits: int | None,
) -> None:
    batch, heads, tokens, size = query.shape
    kept = query.dtype if bits is None else torch.uint8
    if (
        query.dtype not in DTYPE_CODES
        or size != head_dims[0]
        or not all(0 < n <= MAX_HEAD_DIM for n in head_dims)
        or any(t.stride(-1) != 1 or t.device.type != "cpu" for t in (query, keys, values))
        or any(t.dtype is not kept or t.shape[3] != _row(n, bits) for t, n in zip((keys, values), head_dims))
        or keys.shape[0] != batch
        or keys.shape[:3] != values.shape[:3]
        or not all((batch, tokens, *keys.shape[1:3]))
        or heads % keys.shape[1]
    ):
        raise ValueError(
            f"query {query.dtype} {[*query.shape]}, keys {keys.dtype} {[*keys.shape]} and values {values.dtype} "
            f"{[*values.shape]} of {bits or 'no'} bits and head sizes {head_dims} do not fit one another; sizes are "
            f"at most {MAX_HEAD_DIM}, and the last dimensions contiguous"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window is at least one position, not {window}")
    for name, given, dtype, length in (("starts", starts, torch.int64, batch), ("sinks", sinks, torch.float32, heads)):
        if given is not None and (given.dtype is not dtype or given.shape != (length,) or not given.is_cpu):
            raise ValueError(f"{name} are {dtype} [{length}] on the CPU; got {given.dtype} {[*given.shape]}")
    if mask is not None and (
        mask.dtype is not torch.bool
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2:] != (tokens, keys.shape[2])
        or (mask.stride(3) != 1 and keys.shape[2] > 1)
    ):
        raise ValueError(
            f"mask is bool [1 or {batch}, 1 or {heads}, {tokens}, {keys.shape[2]}], last dimension contiguous; "
            f"got {mask.dtype} {[*mask.shape]}"
        )
