"""Affine quantization against a textbook twin in plain loops, against other choices of scales, and its limits."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_accel.ops import affine
from hf_accel.ops.affine import GROUP_SIZES, Affine, Scheme, dequantize, quantize


def fp32(value: float) -> float:
    """Round a Python float to fp32; every operation of the twin is rounded as the library's fp32 is."""
    return struct.unpack("f", struct.pack("f", value))[0]


def as_dtype(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float32).to(dtype).item()


def twin_group(values: list[float], scheme: Scheme, dtype: torch.dtype) -> tuple[list[int], float, int, float]:
    """Return codes, scale, zero and squared error of the best candidate, by the definition."""
    low, high = {2: (-2, 1), 3: (-4, 3), 4: (-8, 7), 8: (-128, 127)}[scheme.bits]
    smallest, largest = min(values), max(values)
    if scheme.symmetric:
        extreme = largest if largest >= -smallest else smallest
        factors = {2: (-2.0,), 3: (-4.0,), 4: affine._SYMMETRIC_4, 8: (127.0,)}[scheme.bits]
        scales = [extreme / f if f < 0 else abs(extreme) / f for f in factors]
    else:
        smallest, largest = min(smallest, 0.0), max(largest, 0.0)
        factors = affine._ASYMMETRIC_4 if scheme.bits == 4 else (1.0,)
        scales = [fp32(largest - smallest) * fp32(factor / (high - low)) for factor in factors]
    found: list[tuple[list[int], float, int, float]] = []
    for scale in scales:
        scale = as_dtype(fp32(scale), dtype) or 1.0
        zero = 0 if scheme.symmetric else min(max(round(fp32(low - fp32(smallest / scale))), low), high)
        codes = [min(max(round(fp32(w / scale)) + zero, low), high) for w in values]
        error = sum((w - (code - zero) * scale) ** 2 for w, code in zip(values, codes, strict=True))
        found.append((codes, scale, zero, error))
    return min(found, key=lambda candidate: candidate[3])


def squared_error(weight: Tensor, quantized: Affine) -> Tensor:
    """Squared error of every group [N, groups]."""
    groups = quantized.scales.shape[1]
    difference = weight.double() - dequantize(quantized).double()
    return difference.square().unflatten(1, (groups, -1)).sum(-1)


def sqnr(weight: Tensor, quantized: Affine) -> float:
    """Signal to quantization noise in dB."""
    return 10 * math.log10(weight.double().square().sum() / squared_error(weight, quantized).sum())


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


SCHEMES = [Scheme(8), Scheme(8, 32), Scheme(4, 32), Scheme(4, 64, False), Scheme(4, 32, False), Scheme(8, 64, False)]
SCHEMES += [Scheme(3, 32), Scheme(3, 64, False), Scheme(2, 64), Scheme(2, 32, False)]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_a_textbook_in_plain_loops(scheme: Scheme, scale_dtype: torch.dtype) -> None:
    weight = gaussian(6, 128) * torch.tensor([[1.0], [0.02], [30.0], [1.0], [1.0], [1e-3]])
    weight[3] = weight[3].abs() + 0.5  # one sign only: the range of a zero point ends at 0
    weight[4, :64] = 0.0
    found = quantize(weight, scheme, scale_dtype)
    assert found.codes.dtype == torch.int8
    assert found.scales.dtype == scale_dtype
    assert (found.zeros is None) == scheme.symmetric
    values = dequantize(found)
    error, group = squared_error(weight, found), scheme.columns_per_scale(128)
    for n in range(6):
        for g in range(128 // group):
            part = weight[n, g * group : (g + 1) * group]
            codes, scale, zero, least = twin_group(part.tolist(), scheme, scale_dtype)
            if found.scales[n, g].item() == scale:
                assert found.codes[n, g * group : (g + 1) * group].tolist() == codes
                assert found.zeros is None or found.zeros[n, g].item() == zero
                expected = torch.tensor([(code - zero) * scale for code in codes])
                assert torch.equal(values[n, g * group : (g + 1) * group], expected)
            assert error[n, g].item() == pytest.approx(least, rel=1e-4, abs=1e-12)
    assert int(found.codes.min()) >= scheme.lowest
    assert int(found.codes.max()) <= scheme.highest


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_no_group_is_worse_than_the_usual_roundings(group: int) -> None:
    """The largest value divided by 7.5, and llama.cpp's Q4_0: the value of largest magnitude gets the code -8."""
    weight = gaussian(64, 512)
    weight[::2] = weight[::2] ** 3  # heavy tails, too
    grouped = weight.unflatten(1, (-1, group))
    found = squared_error(weight, quantize(weight, Scheme(4, group), torch.float16))

    def error(scale: Tensor, codes: Tensor) -> Tensor:
        return (grouped.double() - codes.double() * scale.double()).square().sum(-1)

    plain = (grouped.abs().amax(-1, keepdim=True) / 7.5).half().float()
    assert bool((found <= error(plain, (grouped / plain).round().clamp(-8, 7)) * (1 + 1e-5)).all())
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    q4_0 = (extreme / -8).half().float()
    bound = error(q4_0, (grouped / q4_0 + 8.5).floor().clamp(0, 15) - 8)
    assert bool((found <= bound * (1 + 1e-5)).all())
    gaussian_rows = slice(1, None, 2)
    assert found[gaussian_rows].sum() < bound[gaussian_rows].sum(), "candidates gain nothing"


@pytest.mark.parametrize(
    "scheme, decibels",
    [
        (Scheme(8), (38.0, 46.0)),
        (Scheme(8, 32), (44.0, 50.0)),
        (Scheme(4, 32), (20.5, 24.0)),
        (Scheme(4, 64), (19.5, 22.5)),
        (Scheme(4, 128), (18.5, 21.5)),
        (Scheme(3, 64), (11.5, 15.0)),
        (Scheme(2, 64), (6.0, 9.0)),
    ],
    ids=str,
)
def test_noise_of_gaussian_weights(scheme: Scheme, decibels: tuple[float, float]) -> None:
    weight = gaussian(256, 1024)
    low, high = decibels
    for dtype in (torch.float32, torch.bfloat16):
        assert low < sqnr(weight, quantize(weight, scheme, dtype)) < high


def test_smaller_groups_are_more_exact() -> None:
    weight = gaussian(128, 1024)
    found = [sqnr(weight, quantize(weight, Scheme(4, group))) for group in GROUP_SIZES]
    assert found[0] > found[1] + 0.3 > found[2] + 0.6


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_a_zero_of_its_own_helps_shifted_weights(group: int) -> None:
    weight = gaussian(64, 512) + 2.0
    symmetric, asymmetric = (sqnr(weight, quantize(weight, Scheme(4, group, kind))) for kind in (True, False))
    assert asymmetric > symmetric + 2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = gaussian(5, 128)
    weight[1] = 0
    weight[3, 64:] = 0
    found = quantize(weight, scheme)
    values = dequantize(found)
    assert bool(values[1].eq(0).all())
    assert bool(values[3, 64:].eq(0).all())
    assert bool(found.scales.isfinite().all())
    assert bool(dequantize(quantize(torch.zeros(3, 128), scheme)).eq(0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_is_a_value_of_every_group(scheme: Scheme) -> None:
    weight = gaussian(8, 128) + 3.0
    weight[:, ::7] = 0
    assert bool(dequantize(quantize(weight, scheme))[:, ::7].eq(0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_value_is_at_most_half_a_step_off_unless_clipped(scheme: Scheme) -> None:
    weight = gaussian(32, 256)
    found = quantize(weight, scheme)
    scales = found.scales.abs().repeat_interleave(scheme.columns_per_scale(256), 1)
    inside = (found.codes > scheme.lowest) & (found.codes < scheme.highest)
    off = (weight - dequantize(found)).abs()
    assert bool((off <= 0.5001 * scales)[inside].all())
    assert inside.float().mean() > 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_half_precision_weights_are_quantized_as_the_fp32_values_they_are(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = gaussian(20, 128).to(dtype)
    one, two = quantize(weight, scheme, torch.bfloat16), quantize(weight.float(), scheme, torch.bfloat16)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)
    assert one.zeros is None or two.zeros is None or torch.equal(one.zeros, two.zeros)
    assert dequantize(one, dtype).dtype == dtype
    assert torch.equal(dequantize(one, dtype), dequantize(one).to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_values_of_their_dtype(scheme: Scheme) -> None:
    """The codes are chosen for the rounded scale: quantizing what was dequantized finds no larger error than none."""
    weight = gaussian(16, 128)
    for dtype in (torch.bfloat16, torch.float16):
        found = quantize(weight, scheme, dtype)
        widened = replace(found, scales=found.scales.float())
        assert torch.equal(dequantize(widened), dequantize(found))
        offset = 0 if found.zeros is None else found.zeros.repeat_interleave(scheme.columns_per_scale(128), 1).float()
        steps = found.scales.float().repeat_interleave(scheme.columns_per_scale(128), 1)
        nearest = ((weight / steps).round() + offset).clamp(scheme.lowest, scheme.highest)
        assert torch.equal(nearest.to(torch.int8), found.codes)


def test_many_rows_are_quantized_as_each_alone() -> None:
    """Blocks of rows: 2^21 elements at a time."""
    weight = gaussian(70, 1 << 15)
    together = quantize(weight, Scheme(4, 32))
    for row in (0, 63, 64, 69):
        alone = quantize(weight[row : row + 1], Scheme(4, 32))
        assert torch.equal(together.codes[row], alone.codes[0])
        assert torch.equal(together.scales[row], alone.scales[0])


@pytest.mark.parametrize("columns", [33, 48, 100])
def test_groups_that_do_not_divide_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=f"groups of 32 do not divide {columns} columns"):
        quantize(gaussian(4, columns), Scheme(4, 32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_that_are_not_finite_are_refused(scheme: Scheme, value: float) -> None:
    weight = gaussian(4, 128)
    weight[3, 127] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_large_finite_values_are_taken(scheme: Scheme) -> None:
    weight = torch.full((2, 128), 1e30)
    weight[:, ::3] = -1e30 if scheme.symmetric else 0.0
    values = dequantize(quantize(weight, scheme))
    assert bool(values.isfinite().all())
    step = 1 / 2 ** (scheme.bits - 1) if scheme.symmetric else 0.0
    assert bool(((values - weight).abs() <= (step + 1e-6) * 1e30).all())


def test_bits_per_weight() -> None:
    assert Scheme(8).bits_per_weight(1024) == 8 + 16 / 1024
    assert Scheme(4, 64).bits_per_weight(1024) == 4.25
    assert Scheme(4, 32, False).bits_per_weight(1024) == 4 + 48 / 32
    assert Scheme(3, 64).bits_per_weight(1024) == 3.25
    assert Scheme(2, 64, False).bits_per_weight(1024) == 2 + 48 / 64
