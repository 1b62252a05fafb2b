"""Attention of a few new tokens over fixed buffers, where only the device knows how much of them is filled.

No size depends on data and nothing asks the device, so that a step made of it can be captured and replayed at any
length. Cost: the whole buffer is read, 2·B·G·C·D elements; kernels read up to `lengths` only.
"""

from __future__ import annotations

import torch

from hf_accel.ops import cached
from hf_accel.ops.attention import grouped_attention


def visible_columns(
    lengths: torch.Tensor, starts: torch.Tensor, tokens: int, capacity: int, window: int | None = None
) -> torch.Tensor:
    """Return bool [B, 1, T, C]: which columns of a buffer each of the new tokens sees.

    lengths, starts: int [B]: token t of row b is at column p = lengths[b] + t, and sees columns from starts[b], or
    p - window + 1 if that is later, up to p.
    """
    device = lengths.device
    columns = torch.arange(capacity, device=device)
    at = (lengths[:, None] + torch.arange(tokens, device=device))[:, :, None]  # [B, T, 1]
    mask = (columns <= at) & (columns >= starts[:, None, None])
    if window is not None:
        mask = mask & (columns > at - window)
    return mask[:, None]


def static_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    *,
    scale: float,
    bits: int | None = None,
    head_dims: tuple[int, int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention [B, H, T, Dv] of query [B, H, T, D] over the columns that are visible to it.

    Args:
        query: of the last T tokens, whose keys and values are in the buffers already.
        keys, values: [B, G, C, D] and [B, G, C, Dv], or with `bits` uint8 rows of codes, see `hf_accel.ops.cached`.
            What lies in columns that nobody sees must be finite.
        lengths: int32 [B], columns filled before these tokens. starts: int32 [B], the first column that is no padding.
        head_dims: D and Dv, which rows of codes do not show.
        window: how many columns a token sees, itself included.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [H], a score per head that takes part in the softmax and has no value.
    """
    if bits is not None:
        size, value_size = head_dims or (query.shape[3], query.shape[3])
        keys = cached.decode(keys, bits, size, query.dtype, is_key=True)
        values = cached.decode(values, bits, value_size, query.dtype, is_key=False)
    mask = visible_columns(lengths, starts, query.shape[2], keys.shape[2], window)
    if softcap is None and sinks is None:
        return grouped_attention(query, keys, values, mask, scale)
    batch, heads, tokens, _ = query.shape
    groups = keys.shape[1]
    folded = query.float().unflatten(1, (groups, heads // groups))  # [B, G, H/G, T, D]
    scores = ((folded * scale) @ keys[:, :, None].float().mT).flatten(1, 2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(batch, heads, tokens, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
    output = weights.unflatten(1, (groups, heads // groups)) @ values[:, :, None].float()
    return output.flatten(1, 2).to(query.dtype)
