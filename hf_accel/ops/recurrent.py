"""One token of recurrent mixers: the short convolution, the gated delta rule, Mamba's two recurrences, the gated norm.

Sources: Yang et al. 2024 (Gated DeltaNet, arXiv:2412.06464), Dao and Gu 2024 (Mamba-2, arXiv:2405.21060), Gu and Dao
2023 (Mamba, arXiv:2312.00752). All is computed in fp32; what the operators of a model round in between is not
rounded here, but for the norm, whose roundings tell its kinds apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class GatedNorm(NamedTuple):
    """A norm by root mean square of groups of `size` values, times the silu or sigmoid of a gate.

    gates_first: the gate is multiplied before the norm. rounds_once: neither before the weight nor before the gate the
    value is rounded to the dtype.
    """

    size: int
    eps: float
    gates_first: bool = False
    rounds_once: bool = False
    is_sigmoid: bool = False


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, norm: GatedNorm) -> Tensor:
    """Return the norm of x [..., n] with gate [..., n] and weight [m], which is repeated; in the dtype of x."""
    values, factor = x.float(), gate.float()
    factor = torch.sigmoid(factor) if norm.is_sigmoid else functional.silu(factor)
    if norm.gates_first:
        values = values * factor
    groups = values.unflatten(-1, (-1, norm.size))
    values = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + norm.eps)).flatten(-2)
    weights = weight.repeat(x.shape[-1] // weight.numel())
    values = weights.float() * values if norm.rounds_once else weights * values.to(x.dtype)
    return (values if norm.gates_first else values * factor).to(x.dtype)


def convolved(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, is_silu: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the causal convolution's value [B, C] for x [B, C], and the state [B, C, K] that has taken it in."""
    state = torch.cat([state[..., 1:], x[..., None]], dim=-1)
    value = (state.float() * weight.float()).sum(-1)
    if bias is not None:
        value = value + bias.float()
    return functional.silu(value) if is_silu else value, state


def delta_step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the gated delta rule reads, [B, H, V], and the state [B, H, K, V] after the token.

    query, key: [B, G, K], each for H / G heads; value [B, H, V]; log_decay [B, H] or, per key, [B, H, K]; beta [B, H].
    """
    repeats = value.shape[1] // key.shape[1]
    query, key = (
        (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)).repeat_interleave(repeats, 1)
        for x in (query.float(), key.float())
    )
    decay = (log_decay[..., None] if log_decay.dim() == 2 else log_decay).exp()
    state = state * decay[..., None]
    delta = (value.float() - torch.einsum("bhk,bhkv->bhv", key, state)) * beta[..., None]
    state = state + key[..., None] * delta[:, :, None]
    return torch.einsum("bhk,bhkv->bhv", query / key.shape[-1] ** 0.5, state), state


def ssd_step(
    x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what Mamba-2's recurrence reads, [B, H, P], and the state [B, H, P, N] after the token.

    x [B, H, P]; dt [B, H], before softplus; a_log, d [H]; b, c [B, G, N], each for H / G heads.
    """
    repeats = x.shape[1] // b.shape[1]
    b, c = (rows.float().repeat_interleave(repeats, 1) for rows in (b, c))
    dt = functional.softplus(dt.float())
    state = state * torch.exp(-a_log.float().exp() * dt)[..., None, None]
    state = state + (dt[..., None] * x.float())[..., None] * b[:, :, None]
    return torch.einsum("bhpn,bhn->bhp", state, c) + x.float() * d.float()[:, None], state


def scan_step(
    x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, d: Tensor, gate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what Mamba's selective scan gives, [B, I], and the state [B, I, N] after the token.

    x, gate [B, I]; dt [B, I], before softplus; a_log [I, N]; b, c [B, N]; d [I].
    """
    dt = functional.softplus(dt.float())[..., None]
    state = state * torch.exp(-a_log.float().exp() * dt) + dt * b.float()[:, None] * x.float()[..., None]
    value = torch.einsum("bin,bn->bi", state, c.float()) + x.float() * d.float()
    return value * functional.silu(gate.float()), state
