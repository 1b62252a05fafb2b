"""Attention of the many queries of a prompt, tile by tile; memory: the output and some tiles per thread."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.kernels.native.attend import MAX_HEAD_DIM, _row
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.ops.cached import decode

TILE = 512


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
    batch, heads, tokens, _ = query.shape
    groups, positions = keys.shape[1:3]
    _check(query, keys, values, head_dims, window, starts, mask, sinks, bits)
    if bits is not None:
        keys = decode(keys, bits, head_dims[0], query.dtype, is_key=True)
        values = decode(values, bits, head_dims[1], query.dtype, is_key=False)
    past = positions - tokens
    columns = torch.arange(positions)
    output = query.new_empty(batch, tokens, heads, head_dims[1])
    for first in range(0, tokens, TILE):
        stop = min(first + TILE, tokens)
        own = torch.arange(past + first, past + stop)[:, None]
        visible = torch.ones(1, 1, stop - first, positions, dtype=torch.bool)
        if is_causal:
            visible = visible & (columns <= own)
        if window is not None:
            visible = visible & (columns > own - window)
        if starts is not None:
            visible = visible & (columns >= starts[:, None, None, None])
        if mask is not None:
            visible = visible & mask[:, :, first:stop]
        visible = visible.expand(batch, heads, -1, -1).unflatten(1, (groups, -1))
        folded = query[:, :, first:stop].float().unflatten(1, (groups, heads // groups))
        scores = folded @ keys[:, :, None].float().mT * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = sinks.view(1, groups, -1, 1, 1).expand(batch, -1, -1, stop - first, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights.masked_fill(~visible, 0.0)
        found = (weights @ values[:, :, None].float()).flatten(1, 2)
        output[:, first:stop] = found.transpose(1, 2).to(query.dtype)
    return output


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
