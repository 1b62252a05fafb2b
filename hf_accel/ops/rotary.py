"""Rotary positions of queries and keys, and the write of keys and values into a static cache."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.ops import cached
from hf_accel.ops.norms import rms_norm


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, heads, D] of which the first R values turn (Su et al. 2021, arXiv:2104.09864, eq. 34).

    cos, sin [1 or B, T, R]: value i turns with value i + R / 2.
    """
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]
    return torch.cat((turned, rest), dim=-1)


def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    bits: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    style: str = "llama",
) -> Tensor:
    """Return the queries [B, H, T, D] of qkv [B, T, (H + 2 G) D], turned; write keys and values.

    Token t of row b goes to column lengths[b] + t of the buffers [B, G, C, D], or of rows of codes where `bits` is 8 or
    4 (`hf_accel.ops.cached`). q_norm, k_norm [D]: weights of RMS norms of each head, before it turns.
    """
    batch, tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=2)
    q = q if q_norm is None else rms_norm(q, q_norm, eps, style)
    k = k if k_norm is None else rms_norm(k, k_norm, eps, style)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    rows = torch.arange(batch, device=qkv.device)[:, None]
    columns = lengths[:, None].long() + torch.arange(tokens, device=qkv.device)
    for buffer, states, is_key in ((keys, k, True), (values, v, False)):
        kept = states.to(buffer.dtype) if bits is None else cached.encode(states, bits, is_key=is_key)
        buffer.transpose(1, 2)[rows, columns] = kept
    return q.transpose(1, 2)
