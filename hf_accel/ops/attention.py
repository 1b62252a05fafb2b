"""Attention for few queries over grouped keys and values, without expanding them.

Grouped-query attention (Ainslie et al. 2023, section 2.2): H query heads share G key/value heads. For few queries the
cost is reading K and V once, 2·B·G·S·D elements; `repeat_kv` would read and write H/G times that. Folding the group
into the query dimension turns H heads of T queries into G heads of H/G·T queries, on K and V as they are.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax(scale · q kᵀ + mask) v of each query head with its group's keys and values.

    Args:
        query: [B, H, T, D].
        key: [B, G, S, D], H a multiple of G.
        value: [B, G, S, Dv].
        mask: None (every query sees every key), or [B or 1, 1 or H, T, S], bool (true: visible) or additive.
        scale: default 1/sqrt(D).

    Returns: [B, H, T, Dv].

    Raises:
        ValueError: H is not a multiple of G.
    """
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key/value heads evenly.")
    ratio = heads // groups
    folded = query.reshape(batch, groups, ratio * tokens, size)  # [B, G, H/G·T, D]
    if mask is not None:
        if mask.shape[1] == 1:
            mask = mask.repeat(1, 1, ratio, 1) if tokens > 1 else mask  # [B, 1, H/G·T, S]; one query broadcasts
        else:
            mask = mask.reshape(mask.shape[0], groups, ratio * tokens, mask.shape[3])
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, tokens, value.shape[3])
