"""Random tokens of recurrent mixers for the sweep over native calls: odd sizes of heads, groups, states and chunks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import MixerShape, MixerWeights, NativeMixer, Span
from hf_accel.ops.recurrent import GatedNorm

Drawn = Callable[..., Tensor]


def mixer_case(
    kind: str, pick: Random, draw: Drawn, put: Callable[[Tensor], Any], dtype: torch.dtype
) -> tuple[str, Callable[[], Tensor]]:
    """Return what a step is, and the call of it on operands in guarded memory; it begins from the same states.

    draw: returns random values of the dtype; put: moves a tensor to guarded memory.
    """
    batch, groups, taps = pick.choice([1, 2, 3]), pick.choice([1, 2]), pick.choice([2, 3, 4, 7])
    heads, keys, values = (
        groups * pick.choice([1, 3]),
        pick.choice([1, 5, 16, 33, 128]),
        pick.choice([1, 7, 16, 40, 64]),
    )
    inner, channels = heads * values, heads * values + 2 * groups * keys
    if kind == "conv":
        channels = pick.choice([1, 7, 64, 65, 300])
    if kind == "scan":
        heads = pick.choice([1, 5, 64, 67, 130])
    layout: dict[str, Any] = {"channels": channels, "taps": taps, "heads": heads, "groups": groups, "key_dim": keys}
    weights: dict[str, Any] = {"conv": draw(channels, 1, taps)}
    if kind == "conv":
        gate, before, x = (Span(0, place * channels, channels) for place in range(3))
        shape = MixerShape(kind="conv", parts=(x,), gate=gate, before=before, channels=channels, taps=taps)
        widths, state = [3 * channels], None
    elif kind == "scan":
        parts = (Span(0, 0, heads), Span(1, heads, keys), Span(1, heads + keys, keys))
        shape = MixerShape(
            kind="scan", parts=parts, rate=Span(1, 0, heads), gate=Span(0, heads, heads), heads=heads, key_dim=keys
        )
        weights = {"a_log": draw(heads, keys), "dt_bias": draw(heads), "d": draw(heads)}
        widths, state = [2 * heads, heads + 2 * keys], (heads, keys)
    else:
        norm = GatedNorm(
            values if kind == "delta" else inner // groups, 1e-5, kind == "ssd", pick.choice([True, False])
        )
        weights |= {name: draw(heads) for name in ("a_log", "dt_bias", "d")}
        weights |= {"conv_bias": draw(channels), "norm": draw(values if kind == "delta" else inner)}
        shape = MixerShape(
            kind=kind,
            parts=(Span(0, 0, channels),),
            gate=Span(1, 0, inner, values, values + 3),
            rate=Span(0, channels, heads),
            beta=Span(0, channels + heads, heads),
            is_silu=True,
            value_dim=values,
            norm=norm,
            **layout,
        )
        widths = [channels + 2 * heads, heads * (values + 3) - 3]
        state = (heads, keys, values) if kind == "delta" else (heads, values, keys)
    kernel = NativeMixer(shape, MixerWeights(**{name: put(tensor) for name, tensor in weights.items()}), dtype)
    rows = [put(draw(batch, 1, width)) for width in widths]
    conv = None if kind == "scan" else put(draw(batch, channels, taps))
    states = None if state is None else put(draw(batch, *state).float())
    kept = [None if tensor is None else tensor.clone() for tensor in (conv, states)]

    def run() -> Tensor:
        for tensor, before in zip((conv, states), kept, strict=True):
            if tensor is not None:
                tensor.copy_(before)
        out = kernel(rows, conv, states)
        if out is None:
            raise ValueError(f"{shape} is not served")
        parts = [out.flatten().float(), *(tensor.flatten().float() for tensor in (conv, states) if tensor is not None)]
        return torch.cat(parts)

    return f"{batch} x {shape}", run
