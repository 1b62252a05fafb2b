"""The choice of the next token on a GPU: the argmax of each row's logits, in two launches. Twin: `hf_accel.ops.choice`.

Values become whole numbers of the same order, NaN the largest, joined with their place from the end, so that one
maximum finds what `torch.argmax` does: a NaN if there is one, and of what is equal the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel.kernels.triton import on_its_device

CHUNK = 4096
"""Logits that one program reads."""


@triton.jit
def _chunks(logits, best, vocabulary, stride, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(1)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = at < vocabulary
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=mask, other=0.0).to(tl.float32) + 0.0  # no -0
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(x == x, order, 0x7FFFFFFF)
    joined = (order.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
    joined = tl.where(mask, joined, -0x7FFFFFFFFFFFFFFF)
    tl.store(best + row * CHUNKS + tl.program_id(0), tl.max(joined, axis=0))


@triton.jit
def _final(best, tokens, ids, positions, stride, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, APPENDS: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    joined = tl.load(best + row * CHUNKS + at, mask=at < CHUNKS, other=-0x7FFFFFFFFFFFFFFF)
    token = 0x7FFFFFFF - (tl.max(joined, axis=0) & 0xFFFFFFFF)
    tl.store(tokens + row, token)
    if APPENDS:
        tl.store(ids + row.to(tl.int64) * stride + tl.load(positions + row), token)


@on_its_device
def choose(logits: Tensor, ids: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Return the argmax of logits [B, V], int64 [B]; written to ids[b, positions[b]] where `ids` int64 [B, C] is given.

    The last dimension of logits and of ids in one piece; positions: int32 or int64 [B] on the device.
    """
    rows, vocabulary = logits.shape
    chunks = -(-vocabulary // CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _chunks[(chunks, rows)](logits, best, vocabulary, logits.stride(0), CHUNK=CHUNK, CHUNKS=chunks, num_warps=4)
    _final[(rows,)](
        best, tokens, tokens if ids is None else ids, tokens if positions is None else positions,
        0 if ids is None else ids.stride(0), CHUNKS=chunks, BLOCK=triton.next_power_of_2(chunks),
        APPENDS=ids is not None, num_warps=1,
    )  # fmt: skip
    return tokens
