"""Attention over parts of a cache one after the other, and the writing of quantized rows; cost: K and V once."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.kernels.weights import FORMATS
from hf_accel.ops.attention import AttentionState
from hf_accel.ops.cached import row_bytes

MAX_HEAD_DIM = 256

_ATTEND = struct.Struct("=7Q23q2d")
_ENCODE = struct.Struct("=2Q11q")


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dims: tuple[int, int],
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    bits: int | None = None,
    state: AttentionState | None = None,
) -> AttentionState:
    """Merge attention over one part of the cache into `state` (changed in place), or begin one.

    Args:
        query: [B, H, T, D] of bf16, fp16 or fp32, last dimension contiguous.
        keys, values: [B, G, n, ...] of the same dtype, or rows of codes (uint8) of `bits` 8 or 4.
        head_dims: D of keys, D of values; at most 256.
        mask: bool [1 or B, 1 or H, T, n], true: visible. None: every query sees every position.

    Raises:
        ValueError: sizes or types that do not fit one another.
    """
    batch, heads, tokens, size = query.shape
    if state is None:
        shape = (batch, heads, tokens)
        made = AttentionState(query.new_empty((*shape, head_dims[1]), dtype=torch.float32),
                              *(query.new_empty(shape, dtype=torch.float32) for _ in range(2)))  # fmt: skip
    else:
        made = state
    kept = query.dtype if bits is None else torch.uint8
    if (
        query.dtype not in DTYPE_CODES
        or size != head_dims[0]
        or any(t.stride(-1) != 1 or t.device.type != "cpu" for t in (query, keys, values))
        or any(t.dtype is not kept or t.shape[3] != _row(n, bits) for t, n in zip((keys, values), head_dims))
        or keys.shape[0] != batch
        or keys.shape[:3] != values.shape[:3]
        or made.values.shape != (batch, heads, tokens, head_dims[1])
    ):
        raise ValueError(
            f"query {query.dtype} {[*query.shape]}, keys {keys.dtype} {[*keys.shape]} and values {values.dtype} "
            f"{[*values.shape]} of {bits or 'no'} bits and head sizes {head_dims} do not fit one another"
        )
    mask_strides = [0, 0, 0]
    if mask is not None:
        if (
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
        mask_strides = [stride if n > 1 else 0 for stride, n in zip(mask.stride()[:3], mask.shape[:3], strict=True)]
    call = _ATTEND.pack(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), 0 if mask is None else mask.data_ptr(),
        made.values.data_ptr(), made.top.data_ptr(), made.sum.data_ptr(),
        DTYPE_CODES[query.dtype], FORMATS[bits], batch, tokens, heads, keys.shape[1], *head_dims, keys.shape[2],
        state is None, torch.get_num_threads(), *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *mask_strides, scale, softcap or 0.0,
    )  # fmt: skip
    if _library.library().hfa_attend(call):
        raise ValueError(f"native attention does not take {heads} heads over {keys.shape[1]} of sizes {head_dims}")
    return made


def encode(states: Tensor, bits: int, rows: Tensor, *, is_key: bool) -> None:
    """Write states [B, G, T, D] as rows [B, G, T, R] of codes; equal to `hf_accel.ops.cached.encode` bit for bit.

    Raises:
        ValueError: the head size is above 256, the kernels do not know the dtype, or the rows have another shape.
    """
    batch, heads, tokens, size = states.shape
    if states.dtype not in DTYPE_CODES or states.stride(-1) != 1 or rows.stride(-1) != 1:
        raise ValueError(f"native encoding does not take {states.dtype} with strides {states.stride()}")
    if rows.dtype is not torch.uint8 or rows.shape != (batch, heads, tokens, _row(size, bits)):
        raise ValueError(f"states {[*states.shape]} do not fit rows {rows.dtype} {[*rows.shape]} of {bits} bits")
    threads = torch.get_num_threads()
    for b in range(batch):
        x, to = states[b], rows[b]
        call = _ENCODE.pack(
            x.data_ptr(), to.data_ptr(), DTYPE_CODES[states.dtype], FORMATS[bits], heads, tokens, size, is_key, threads,
            x.stride(0), x.stride(1), to.stride(0), to.stride(1),
        )  # fmt: skip
        if _library.library().hfa_encode(call):
            raise ValueError(f"native encoding takes head sizes up to {MAX_HEAD_DIM}, not {size}")


def _row(size: int, bits: int | None) -> int:
    """Return the elements of a row of `size` values; -1 where it is odd, as no row in 4 bits can have them."""
    return size if bits is None else row_bytes(bits, size) if bits == 8 or size % 2 == 0 else -1
