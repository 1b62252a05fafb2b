"""The attention kernel `sdpa`: torch's scaled_dot_product_attention, without expanding heads, padding or windows.

Rows of a padded batch run one after the other, each from its first token on; queries with a window or with a past run
in blocks, over the columns that a block sees. On CUDA the FlashAttention beneath it does these in one call. Grouped
heads are folded into queries (`hf_accel.ops.attention`) where a mask would make torch expand them. Memory: the masks of
a block, and for masks of the user's what they take themselves.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from hf_accel.attention.kernel import AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.attention.torch_flash import flash_attention, is_usable
from hf_accel.ops.attention import grouped_attention

BLOCK = 512  # queries that share a mask, where a window is no longer than that


class Sdpa(AttentionKernel):
    """torch's own: all masks, neither soft caps nor sinks."""

    name = "sdpa"

    def obstacle(self, question: Question) -> str | None:
        if question.softcap is not None:
            return "it caps no scores"
        return "it has no sinks" if question.has_sinks else None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if visible.mask is not None:
            return grouped_attention(query, key, value, visible.mask, scale).transpose(1, 2).contiguous()
        if not visible.is_causal:
            return grouped_attention(query, key, value, None, scale).transpose(1, 2).contiguous()
        is_whole = query.shape[2] == key.shape[2] and visible.starts is None and visible.window is None
        # which of its kernels is the fastest for a whole prompt torch knows: as stock asks it
        if is_usable(query, value) and not is_whole:
            return flash_attention(query, key, value, visible, scale)
        return by_rows(query, key, value, visible, scale)


def by_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible, scale: float
) -> torch.Tensor:
    """Return causal attention [B, T, H, Dv] of the rows that are no padding, each over its own columns."""
    batch, heads, tokens, _ = query.shape
    past = key.shape[2] - tokens
    if visible.starts is None:
        return _row(query, key, value, visible.window, scale).transpose(1, 2).contiguous()
    output = query.new_zeros((batch, tokens, heads, value.shape[3]))
    for b, start in enumerate(visible.starts):
        first = max(0, start - past)  # queries before it are padding
        if first < tokens:
            q, k, v = query[b : b + 1, :, first:], key[b : b + 1, :, start:], value[b : b + 1, :, start:]
            output[b : b + 1, first:] = _row(q, k, v, visible.window, scale).transpose(1, 2)
    return output


def _row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
    """Return causal attention [B, H, T, Dv] of rows without padding."""
    tokens, positions = q.shape[2], k.shape[2]
    if tokens == positions and (window is None or window >= positions):
        is_grouped = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
    parts = []
    step = max(BLOCK, window or 0)
    for top in range(0, tokens, step):
        stop = min(top + step, tokens)
        right = positions - tokens + stop
        left = 0 if window is None else max(0, positions - tokens + top - window + 1)
        ends = torch.arange(positions - tokens + top, right, device=q.device)[:, None]
        columns = torch.arange(left, right, device=q.device)
        mask = columns <= ends
        if window is not None:
            mask &= columns > ends - window
        part = grouped_attention(q[:, :, top:stop], k[:, :, left:right], v[:, :, left:right], mask[None, None], scale)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
