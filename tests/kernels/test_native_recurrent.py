"""One token of recurrent mixers in one native call against the twins, for every instruction set this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_native_block import isa
from torch import Tensor

from hf_accel.kernels.native import MixerShape, MixerWeights, NativeMixer, Span
from hf_accel.ops.recurrent import GatedNorm, convolved, delta_step, gated_norm, scan_step, ssd_step

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.native
BATCH = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# of sums that are rounded in other places
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Drawn:
    """Random tensors of one dtype, one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*sizes, generator=self.generator).to(dtype or self.dtype)


def assert_near(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert found is not None
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(difference) < CLOSE[dtype], f"{difference:.1e}"


@DTYPES
@pytest.mark.parametrize(("channels", "taps"), [(70, 3), (300, 4), (33, 7), (5, 2)])
def test_short_convolutions_equal_their_twin(channels: int, taps: int, dtype: torch.dtype, isa: str) -> None:
    draw = Drawn(dtype)
    rows, state = draw(BATCH, 1, 3 * channels + 2), draw(BATCH, channels, taps)
    weight, bias = draw(channels, 1, taps), draw(channels)
    for is_silu in (False, True):
        before, gate, x = (Span(0, place * channels + 1, channels) for place in range(3))
        shape = MixerShape(
            kind="conv", parts=(x,), before=before, gate=gate, channels=channels, taps=taps, is_silu=is_silu
        )
        kernel = NativeMixer(shape, MixerWeights(conv=weight, conv_bias=bias), dtype)
        b, c, x_rows = rows[:, 0, 1:-1].split(channels, dim=-1)
        expected, after = convolved(b * x_rows, state, weight[:, 0], bias, is_silu=is_silu)
        moved = state.clone()
        assert_near(kernel([rows], moved), (expected * c.float())[:, None], dtype)
        assert torch.equal(moved, after)


@pytest.mark.parametrize("has_decay", [False, True])
@DTYPES
@pytest.mark.parametrize(("keys", "values"), [(12, 19), (128, 64), (5, 100)])
def test_delta_rules_equal_their_twin(keys: int, values: int, has_decay: bool, dtype: torch.dtype, isa: str) -> None:
    draw, groups, heads, taps = Drawn(dtype), 2, 6, 4
    each = heads // groups
    channels, inner = 2 * groups * keys + heads * values, heads * values
    # head after head: a group's query, key, its values and their gates
    joined, few = draw(BATCH, 1, groups * (2 * keys + 2 * each * values)), draw(BATCH, 1, 2 * heads)
    wide = 2 * keys + 2 * each * values
    q, k, v, z = joined.view(BATCH, groups, wide).split([keys, keys, each * values, each * values], dim=-1)
    spans = [Span(0, start, count, count // groups, wide) for start, count in (
        (0, groups * keys), (keys, groups * keys), (2 * keys, inner), (2 * keys + each * values, inner))]  # fmt: skip
    norm = GatedNorm(values, 1e-6, rounds_once=has_decay, is_sigmoid=has_decay)
    weights = MixerWeights(
        conv=draw(channels, 1, taps),
        a_log=draw(heads, dtype=torch.float32),
        dt_bias=draw(heads),
        norm=draw(values),
    )
    shape = MixerShape(
        kind="delta",
        parts=tuple(spans[:3]),
        gate=spans[3],
        beta=Span(1, 0, heads),
        rate=Span(1, heads, heads),
        channels=channels,
        taps=taps,
        is_silu=True,
        heads=heads,
        groups=groups,
        key_dim=keys,
        value_dim=values,
        norm=norm,
        beta_scale=2.0,
    )
    conv, state = draw(BATCH, channels, taps), draw(BATCH, heads, keys, values, dtype=torch.float32)
    rows = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
    mixed, conv_after = convolved(rows, conv, weights.conv[:, 0], None, is_silu=True)
    parts = mixed.to(dtype).split([groups * keys, groups * keys, inner], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, (keys, keys, values), strict=True))
    beta, rate = few[:, 0].float().split(heads, dim=-1)
    logs = -weights.a_log.exp() * torch.nn.functional.softplus(rate + weights.dt_bias.float())
    decay = -torch.rand(BATCH, 1, heads, keys, generator=draw.generator) if has_decay else None
    expected, after = delta_step(query, key, value, logs if decay is None else decay[:, 0], 2 * beta.sigmoid(), state)
    expected = gated_norm(expected.to(dtype), z.reshape(BATCH, heads, values), weights.norm, norm)
    moved = conv.clone(), state.clone()
    found = NativeMixer(shape, weights, dtype)([joined, few], *moved, decay)
    assert_near(found, expected.flatten(1)[:, None], dtype)
    assert torch.equal(moved[0], conv_after)
    assert_near(moved[1], after, dtype)


@DTYPES
@pytest.mark.parametrize(("width", "states"), [(16, 20), (64, 128), (9, 33)])
@pytest.mark.parametrize("kind", ["norm", "gate"])
def test_mamba2_equals_its_twin(kind: str, width: int, states: int, dtype: torch.dtype, isa: str) -> None:
    draw, groups, heads, taps = Drawn(dtype), 2, 4, 4
    inner, channels = heads * width, heads * width + 2 * groups * states
    norm = GatedNorm(inner // groups, 1e-5, gates_first=True) if kind == "norm" else None
    weights = MixerWeights(
        conv=draw(channels, 1, taps),
        conv_bias=draw(channels),
        a_log=draw(heads),
        dt_bias=draw(heads),
        d=draw(heads),
        norm=draw(inner) if norm else None,
    )
    shape = MixerShape(
        kind="ssd",
        parts=(Span(0, inner, channels),),
        gate=Span(0, 0, inner),
        rate=Span(0, inner + channels, heads),
        channels=channels,
        taps=taps,
        is_silu=True,
        heads=heads,
        groups=groups,
        key_dim=states,
        value_dim=width,
        norm=norm,
    )
    rows, conv = draw(BATCH, 1, inner + channels + heads), draw(BATCH, channels, taps)
    state = draw(BATCH, heads, width, states, dtype=torch.float32)
    gate, mixed, rate = rows[:, 0].split([inner, channels, heads], dim=-1)
    mixed, conv_after = convolved(mixed, conv, weights.conv[:, 0], weights.conv_bias, is_silu=True)
    x, b, c = mixed.to(dtype).split([inner, groups * states, groups * states], dim=-1)
    grouped = [part.unflatten(-1, (groups, states)) for part in (b, c)]
    step = rate.float() + weights.dt_bias.float()
    expected, after = ssd_step(x.unflatten(-1, (heads, width)), step, weights.a_log, *grouped, weights.d, state)
    expected = expected.flatten(1).to(dtype)
    if norm is not None:
        expected = gated_norm(expected, gate, weights.norm, norm)
    else:
        expected = expected * torch.nn.functional.silu(gate)
    moved = conv.clone(), state.clone()
    assert_near(NativeMixer(shape, weights, dtype)([rows], *moved), expected[:, None], dtype)
    assert torch.equal(moved[0], conv_after)
    assert_near(moved[1], after, dtype)


@DTYPES
@pytest.mark.parametrize(("inner", "states"), [(70, 16), (130, 19)])
def test_scans_equal_their_twin(inner: int, states: int, dtype: torch.dtype, isa: str) -> None:
    draw = Drawn(dtype)
    a_log, bias, d = draw(inner, states, dtype=torch.float32), draw(inner), draw(inner)
    shape = MixerShape(
        kind="scan",
        parts=(Span(0, 0, inner), Span(2, 0, states), Span(2, states, states)),
        rate=Span(1, 0, inner),
        gate=Span(0, inner, inner),
        heads=inner,
        key_dim=states,
    )
    rows, times, few = draw(BATCH, 1, 2 * inner), draw(BATCH, 1, inner), draw(BATCH, 1, 2 * states)
    state = draw(BATCH, inner, states, dtype=torch.float32)
    x, gate = rows[:, 0].chunk(2, dim=-1)
    b, c = few[:, 0].chunk(2, dim=-1)
    expected, after = scan_step(x, times[:, 0] + bias, a_log, b, c, d, gate, state)
    kernel = NativeMixer(shape, MixerWeights(a_log=a_log, dt_bias=bias, d=d), dtype)
    assert_near(kernel([rows, times, few], None, state), expected[:, None], dtype)
    assert_near(state, after, dtype)


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    draw = Drawn(torch.float32)
    shape: dict[str, Any] = {"kind": "conv", "parts": (Span(0, 0, 8),), "channels": 8}
    weights = MixerWeights(conv=draw(8, 1, 4))
    kernel, state = NativeMixer(MixerShape(**shape, taps=4), weights, torch.float32), draw(2, 8, 4)
    before = state.clone()
    for rows in (draw(2, 1, 7), draw(2, 2, 8), draw(2, 1, 8).bfloat16(), draw(3, 1, 8)):
        assert kernel([rows], state) is None
    for other in (state.bfloat16(), state[:, :4], state.transpose(1, 2), None):
        assert kernel([draw(2, 1, 8)], other) is None
    assert kernel([draw(2, 1, 8)], state, draw(2, 8)) is None
    assert torch.equal(state, before)
    wide = MixerShape(**shape, taps=9)
    assert NativeMixer(wide, MixerWeights(conv=draw(8, 1, 9)), torch.float32)([draw(2, 1, 8)], draw(2, 8, 9)) is None
    with pytest.raises(ValueError, match=r"its conv is \[8, 1, 4\] and not \[8, 1, 3\]"):
        NativeMixer(MixerShape(**shape, taps=3), weights, torch.float32)
    with pytest.raises(ValueError, match="its conv does not lie in one piece"):
        NativeMixer(MixerShape(**shape, taps=4), weights, torch.bfloat16)
