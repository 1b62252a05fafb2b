"""Attention for few queries over grouped keys and values, without expanding them.

Grouped-query attention (Ainslie et al. 2023, section 2.2): H query heads share G key/value heads. For few queries the
cost is reading K and V once, 2·B·G·S·D elements; `repeat_kv` would read and write H/G times that. Folding the group
into the query dimension turns H heads of T queries into G heads of H/G·T queries, on K and V as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class AttentionState:
    """What attention over some of the positions has given, fp32: values [B, H, T, Dv] weighted by exp(score - top), and
    the maximum score `top` and the sum of weights `sum`, [B, H, T], of every query (-inf and 0: it saw nothing)."""

    values: torch.Tensor
    top: torch.Tensor
    sum: torch.Tensor

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """Return attention [B, H, T, Dv] over all of them; zero where a query saw nothing."""
        total = self.sum[..., None]
        return torch.where(total == 0, 0.0, self.values / total).to(dtype)

    def merge(self, other: AttentionState) -> AttentionState:
        """Return the state over the positions of both (Milakov and Gimelshein 2018, arXiv:1805.02867, eq. 4)."""
        top = torch.maximum(self.top, other.top)
        mine, others = (torch.where(s.top == -torch.inf, 0.0, torch.exp(s.top - top)) for s in (self, other))
        values = self.values * mine[..., None] + other.values * others[..., None]
        return AttentionState(values, top, self.sum * mine + other.sum * others)


SCORES = 1 << 23  # elements of scores at a time: 32 MiB
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    state: AttentionState | None = None,
) -> AttentionState:
    """Return `state` merged with attention of query [B, H, T, D] over some keys [B, G, n, D] and values [B, G, n, Dv].

    mask: bool [B or 1, 1 or H, T, n], true: visible. In fp32; where ATen's fused attention cannot be had (another
    device, a soft cap, values of another size), B·H·T·n scores are made, for some keys at a time.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    has_flash = _flash is not None and query.is_cpu and not softcap and key.shape[3] == value.shape[3]
    part = (_fused if has_flash else _in_steps)(query, key, value, mask, scale, softcap)
    return part if state is None else state.merge(part)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    _: float | None,
) -> AttentionState:
    """Attention by ATen, which also gives the logarithm of the sum of exponentials: a state whose sum is 1."""
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    folded = query.float().reshape(batch, groups, heads // groups * tokens, size)  # [B, G, H/G·T, D]
    bias = None
    if mask is not None:
        mask = mask.expand(-1, heads, -1, -1)
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        bias = bias.reshape(mask.shape[0], groups, heads // groups * tokens, mask.shape[3])
    output, total = _flash(folded, key.float(), value.float(), 0.0, False, attn_mask=bias, scale=scale)  # type: ignore[misc]
    top, total = total.reshape(batch, heads, tokens), torch.ones(batch, heads, tokens)
    if mask is not None:
        blind = ~mask.any(-1)  # what such a query is given is not attention
        top, total = top.masked_fill(blind, -torch.inf), total.masked_fill(blind, 0.0)
    return AttentionState(output.reshape(batch, heads, tokens, size) * total[..., None], top, total)


def _in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> AttentionState:
    batch, heads, tokens, _ = query.shape
    groups, positions = key.shape[1:3]
    step = max(64, min(positions, SCORES // (batch * heads * tokens)))
    folded = query.float().unflatten(1, (groups, heads // groups)) * scale  # [B, G, H/G, T, D]
    state: AttentionState | None = None
    for start in range(0, positions, step):
        keys, values = (x[:, :, None, start : start + step].float() for x in (key, value))
        scores = folded @ keys.mT  # [B, G, H/G, T, n]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.flatten(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., start : start + step], -torch.inf)
        top = scores.amax(-1)
        weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top)[..., None])
        weighted = (weights.unflatten(1, (groups, heads // groups)) @ values).flatten(1, 2)
        part = AttentionState(weighted, top, weights.sum(-1))
        state = part if state is None else state.merge(part)
    if state is None:
        raise ValueError("attention over no positions")
    return state
