"""Attention in tiles, with memory that is linear in the text: the reference for every attention kernel.

The softmax is taken online (Milakov and Gimelshein 2018, arXiv:1805.02867, Algorithm 3): per query the largest score so
far, the sum of exponentials and the weighted sum of values are kept, and rescaled when a tile brings a larger score
(FlashAttention, Dao et al. 2022, arXiv:2205.14135, Algorithm 1). What remains of a query is its output and the
logarithm of the sum of exponentials (log-sum-exp), from which results over different keys are merged or a sink added.
Tiles that no query of theirs sees are not computed. Cost: 4·B·H·D operations per visible pair, B·H·(query tile)·(key
tile) scores at a time, in fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch

QUERY_TILE, KEY_TILE = 128, 256
Result = tuple[torch.Tensor, torch.Tensor]


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    starts: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Result:
    """Return softmax over the visible columns of cap(scale · q kᵀ) + mask, times v, and its log-sum-exp.

    Args:
        query: [B, H, T, D]; its last query belongs to the last column.
        key: [B, G, S, D], value: [B, G, S, Dv]; query heads share them in order, H/G each.
        scale: default 1/sqrt(D).
        is_causal: query t sees columns up to S - T + t.
        window: the last so many of these; causal only.
        starts: int64 [B]: columns before starts[b] are padding, which nobody sees.
        mask: [1 or B, 1 or H, T, S], bool (true: visible) or a summand.
        softcap: cap(x) = softcap · tanh(x / softcap).
        sinks: [H], one more score per head that has no value.

    Returns: output [B, H, T, Dv] of query's dtype, zero where a query sees nothing; log-sum-exp [B, H, T], fp32 or
        float64, sinks included, -inf where a query sees nothing.

    Raises:
        ValueError: H is not a multiple of G, or a window without is_causal.
    """
    batch, heads, tokens, size = query.shape
    groups, positions = key.shape[1:3]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key/value heads evenly.")
    if window is not None and not is_causal:
        raise ValueError("A window is the last columns that a causal query sees; is_causal=False has none.")
    exact = torch.float64 if query.dtype is torch.float64 else torch.float32
    scale = size**-0.5 if scale is None else scale
    past, first = positions - tokens, 0 if starts is None else int(starts.min())
    outputs, totals = [], []
    for top_row in range(0, tokens, QUERY_TILE):
        rows = torch.arange(top_row, min(top_row + QUERY_TILE, tokens), device=query.device)
        seen_from, seen_to = first, positions
        if is_causal:
            seen_to = past + int(rows[-1]) + 1
            seen_from = max(first, 0 if window is None else past + top_row - window + 1)
        q = query[:, :, top_row : top_row + len(rows)].to(exact).reshape(batch, groups, -1, size) * scale
        most = query.new_full((batch, heads, len(rows)), -torch.inf, dtype=exact)
        total = torch.zeros_like(most)
        output = query.new_zeros((batch, heads, len(rows), value.shape[3]), dtype=exact)
        for left in range(seen_from, seen_to, KEY_TILE):
            columns = torch.arange(left, min(left + KEY_TILE, seen_to), device=query.device)
            k, v = (x[:, :, left : left + len(columns)].to(exact) for x in (key, value))
            scores = (q @ k.mT).view(batch, heads, len(rows), len(columns))
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                part = mask[:, :, top_row : top_row + len(rows), left : left + len(columns)]
                is_bool = part.dtype is torch.bool
                scores = scores.masked_fill(~part, -torch.inf) if is_bool else scores + part.to(exact)
            hidden = _hidden(past + rows[:, None], columns, is_causal, window, starts)
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            new = torch.maximum(most, scores.amax(-1))
            base = torch.where(new == -torch.inf, 0.0, new)  # exp(-inf - -inf) is no number
            weights, old = torch.exp(scores - base[..., None]), torch.exp(most - base)
            total = total * old + weights.sum(-1)
            added = (weights.view(batch, groups, -1, len(columns)) @ v).view(batch, heads, len(rows), -1)
            output, most = output * old[..., None] + added, new
        lse = torch.where(total == 0, -torch.inf, most + torch.log(total))
        outputs.append(torch.where(total[..., None] == 0, 0.0, output / total[..., None]))
        totals.append(lse)
    output, lse = torch.cat(outputs, dim=2), torch.cat(totals, dim=2)
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return output.to(query.dtype), lse


def with_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> Result:
    """Return output [B, H, T, Dv] and log-sum-exp [B, H, T] of attention whose softmax has `sinks` [H] as a score more.

    The sum of exponentials grows by exp(sink), so the output shrinks by the share that it had of the new sum.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return output * torch.exp(lse - total)[..., None].to(output.dtype), total


def _hidden(
    ends: torch.Tensor, columns: torch.Tensor, is_causal: bool, window: int | None, starts: torch.Tensor | None
) -> torch.Tensor | None:
    """Return which columns [n] queries whose last visible column is `ends` [T, 1] do not see, [1 or B, 1, T, n]."""
    hidden = None
    if is_causal:
        hidden = columns > ends
        if window is not None:
            hidden |= columns <= ends - window
        hidden = hidden[None, None]
    if starts is not None:
        padding = columns < starts.to(columns.device)[:, None, None, None]
        hidden = padding if hidden is None else hidden | padding
    return hidden
