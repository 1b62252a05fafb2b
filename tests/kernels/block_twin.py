"""Decoder layers as a textbook writes them, in plain torch, and random ones to compare with native calls."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from hf_accel.kernels.native import BlockShape, BlockWeights, Heads, NativeBlock, Norm, Projection, heads_in_order

ACTIVATIONS = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "gelu": gelu,
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius distance; infinite where only one of both is finite."""
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def block_shape(**changes: Any) -> BlockShape:
    """A small layer of Llama's parts with these changes."""
    parts = {"hidden": 72, "heads": 6, "kv_heads": 2, "head_dim": 32, "inner": 100, "activation": "silu", "scale": 0.18}
    parts |= changes
    return BlockShape(**(heads_in_order(parts["heads"], parts["kv_heads"], parts["head_dim"]) | parts))


def changed(shape: BlockShape, **changes: Any) -> BlockShape:
    """The shape with these changes, and heads where they then lie."""
    shape = replace(shape, **changes)
    return replace(shape, **heads_in_order(shape.heads, shape.kv_heads, shape.head_dim))


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x [..., E]; weights [E], or [heads, D] for x [..., heads, D]."""
    if norm is None:
        return x
    wide = x.float()
    weight = torch.ones(()) if norm.weight is None else norm.weight.float()
    if norm.kind == "layer_unit" and norm.weight is not None:
        weight = (1.0 + norm.weight).float()
    if norm.kind.startswith("layer"):
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.kind == "rms":
        return weight.to(x.dtype) * wide.to(x.dtype)
    wide = wide * (1.0 + weight if norm.kind == "rms_unit" and norm.weight is not None else weight)
    return (wide if norm.bias is None else wide + norm.bias.float()).to(x.dtype)


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, shape: BlockShape) -> Tensor:
    """x [B, T, heads, D]; cos, sin [B, T, R]."""
    if shape.rotary == "none" or cos is None or sin is None:
        return x
    size = shape.rotary_size or cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if shape.rotary == "halves":
        cos, sin = cos[..., :size], sin[..., :size]
        other = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
    else:
        step = 2 if shape.rotary == "pairs" else 1
        cos, sin = (angles[..., : size // 2 * step : step].repeat_interleave(2, -1) for angles in (cos, sin))
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    if shape.rotates_once:
        turned, other, cos, sin = turned.float(), other.float(), cos.float(), sin.float()
    return torch.cat(((turned * cos[:, :, None] + other * sin[:, :, None]).to(x.dtype), rest), -1)


def product(x: Tensor, projection: Projection) -> Tensor:
    weight = projection.weight
    return linear(x, weight if isinstance(weight, Tensor) else weight.dequantize(x.dtype), projection.bias)


def taken(row: Tensor, heads: Heads, kv_heads: int, group: int, size: int) -> Tensor:
    """Heads [B, T, kv_heads * group, D] of projected rows [B, T, N]."""
    starts = [heads.start + g * heads.stride + i * heads.step for g in range(kv_heads) for i in range(group)]
    return torch.stack([row[..., start : start + size] for start in starts], 2)


def attention(
    block: NativeBlock, q: Tensor, keys: Tensor, values: Tensor, past: list[int], first: int, mask: Tensor | None
) -> Tensor:
    """[B, T, H, D] of q: one head at a time, explicit softmax."""
    shape, w = block.shape, block.weights
    batch, tokens, heads, _ = q.shape
    mixed = torch.zeros_like(q)
    for b in range(batch):
        end = past[b] + tokens
        columns = torch.arange(first, end)
        for head in range(heads):
            g = head // (heads // shape.kv_heads)
            scores = q[b, :, head].float() @ keys[b, g, first:end].float().T * shape.scale
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            if w.slopes is not None:
                scores = scores + w.slopes[head] * columns
            if mask is None:
                scores = scores.masked_fill(columns > torch.arange(past[b], end)[:, None], -math.inf)
            else:
                rows = mask[b % mask.shape[0], 0, :, : end - first]
                scores = scores.masked_fill(~rows, -math.inf) if rows.dtype is torch.bool else scores + rows.float()
            seen = ~scores.isneginf().all(-1)
            if w.sinks is not None:
                scores = torch.cat((scores, w.sinks[head].float().expand(tokens, 1)), -1)
            weights = scores.softmax(-1)[seen, : end - first]
            mixed[b, seen, head] = (weights @ values[b, g, first:end].float()).to(q.dtype)
    return mixed


def twin(
    block: NativeBlock,
    hidden: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    past: int,
    first: int = 0,
    mask: Tensor | None = None,
    row_past: Tensor | None = None,
) -> Any:
    """What NativeBlock returns, and the keys and values it writes."""
    shape, w = block.shape, block.weights
    batch, tokens, _ = hidden.shape
    d, kv_heads = shape.head_dim, shape.kv_heads
    group = shape.heads // kv_heads
    pasts = [past] * batch if row_past is None else row_past.tolist()
    cos, sin = (None if angles is None else angles.expand(batch, -1, -1) for angles in (cos, sin))

    def head_norm(x: Tensor, norm: Norm | None) -> Tensor:
        return normed(x.flatten(2), norm).view_as(x) if shape.norm_extent == "row" else normed(x, norm)

    def placed(x: Tensor, norm: Norm | None) -> Tensor:
        if shape.norms_after_rotary:
            return head_norm(rotated(x, cos, sin, shape), norm)
        return rotated(head_norm(x, norm), cos, sin, shape)

    read = normed(hidden, w.input_norm)
    row = torch.cat([product(read, projection) for projection in w.projections], -1)
    q = placed(taken(row, shape.q, kv_heads, group, d), w.q_norm)
    if shape.k is not None and shape.v is not None:
        k = placed(taken(row, shape.k, kv_heads, 1, d), w.k_norm)
        v = head_norm(taken(row, shape.v, kv_heads, 1, d), w.v_norm)
        for b, at in enumerate(pasts):
            keys[b, :, at : at + tokens] = k[b].transpose(0, 1)
            values[b, :, at : at + tokens] = v[b].transpose(0, 1)
    mixed = attention(block, q, keys, values, pasts, first, mask)
    if shape.gate is not None:
        mixed = mixed * torch.sigmoid(taken(row, shape.gate, kv_heads, group, d))
    attended = product(mixed.flatten(2), w.o)
    if shape.part == "attention":
        return attended

    def finished(x: Tensor, norm: Norm | None) -> Tensor:
        x = normed(x, norm)
        return x if shape.residual_scale == 1.0 else x * shape.residual_scale

    attended = finished(attended, w.attention_out_norm)
    if shape.is_parallel:
        read = read if w.mlp_norm is None else normed(hidden, w.mlp_norm)
    else:
        hidden = hidden + attended
        read = normed(hidden, w.mlp_norm)
    if shape.part == "half":
        return hidden, read
    assert w.up is not None
    assert w.down is not None
    activation = ACTIVATIONS[shape.activation]
    inner = product(read, w.up)
    inner = activation(inner) if w.gate is None else activation(product(read, w.gate)) * inner
    out = finished(product(inner, w.down), w.mlp_out_norm)
    hidden = hidden + (attended + out if shape.is_parallel else out)
    return hidden if shape.out_scale == 1.0 else hidden * shape.out_scale


def random_block(
    shape: BlockShape,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    head_norms: bool = False,
    out_norms: bool = False,
    fused: bool = False,
    kind: str = "rms",
    seed: int = 0,
) -> NativeBlock:
    """A pre-norm gated layer with three projections."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*size: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    def projection(rows: int, columns: int) -> Projection:
        weight = tensor(rows + 3, columns + 5)[1 : rows + 1, 2 : columns + 2] if fused else tensor(rows, columns)
        return Projection(weight, tensor(rows) if bias else None)

    def norm(size: int) -> Norm:
        return Norm(kind=kind, eps=1e-6, weight=(tensor(size) + (0.0 if kind == "rms_unit" else 1.0)).to(dtype))

    e, i, d = shape.hidden, shape.inner, shape.head_dim
    q, kv = shape.heads * d, shape.kv_heads * d
    weights = BlockWeights(
        projections=(projection(q, e), projection(kv, e), projection(kv, e)), o=projection(e, q), gate=projection(i, e),
        up=projection(i, e), down=projection(e, i), input_norm=norm(e), mlp_norm=norm(e),
        attention_out_norm=norm(e) if out_norms else None, mlp_out_norm=norm(e) if out_norms else None,
        q_norm=norm(d) if head_norms else None, k_norm=norm(d) if head_norms else None,
    )  # fmt: skip
    return NativeBlock(shape, weights)


def inputs(
    shape: BlockShape, dtype: torch.dtype, batch: int, tokens: int, past: int, rotary: int | None = None
) -> dict[str, Any]:
    """Arguments of a call."""
    generator = torch.Generator().manual_seed(batch + 10 * tokens + past)
    size = (batch, shape.kv_heads, past + tokens + 5, shape.head_dim)
    angles = torch.rand(batch, tokens, (rotary or shape.head_dim) // 2, generator=generator).mul(6).repeat(1, 1, 2)
    return {
        "hidden": torch.randn(batch, tokens, shape.hidden, generator=generator).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": torch.randn(size, generator=generator).to(dtype),
        "values": torch.randn(size, generator=generator).to(dtype),
        "past": past,
    }
