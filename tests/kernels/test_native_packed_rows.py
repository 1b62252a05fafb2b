"""Packed weights beside many rows of x: stretches of columns, strips of rows and groups of both that end anywhere.

Values are chosen so that every code is known and every sum is a number that fp32 holds: results are equal, not close.
"""

from __future__ import annotations

import pytest
import torch
from test_native_block import isa
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.kernels.packed import packed_linear
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme, quantize

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.native
PAIRS_FROM = 48  # rows of bf16 that AMX multiplies with dequantized weights, in sums of another order
FEW = [Scheme(bits, group, symmetric) for bits in (4, 3, 2) for group in (32, 64, 128) for symmetric in (True, False)]
SCHEMES = [*FEW, Scheme(8), Scheme(8, 32)]
SIZES = [(33, 32, 512), (40, 33, 640), (70, 64, 1152), (131, 95, 512 + 128), (257, 48, 128)]


def whole_numbers(m: int, k: int, top: int, most: int) -> Tensor:
    """x [M, K] whose codes are its values over a power of two: one of 32 columns is `top`, others at most `most`."""
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randint(-most, most + 1, (m, k // 32, 32), generator=generator).float()
    place = torch.randint(0, 32, (m, k // 32, 1), generator=generator)
    x.scatter_(2, place, torch.where(place % 2 == 0, float(top), float(-top)))
    return (x * 2.0 ** torch.randint(0, 2, (m, k // 32, 1), generator=generator)).reshape(m, k)


def weight(n: int, k: int, scheme: Scheme) -> tuple[PackedWeight, Tensor]:
    """Return a packed weight whose scales are powers of two, and its values [N, K]."""
    generator = torch.Generator().manual_seed(n * k)
    half = 1 if scheme.bits == 8 else 1 << scheme.bits - 1  # beside codes of 16 bits sums would outgrow fp32
    codes = torch.randint(-half, half, (n, k), generator=generator).to(torch.int8)
    groups = k // scheme.columns_per_scale(k)
    scales = 2.0 ** torch.randint(-1, 2, (n, groups), generator=generator)
    zeros = None if scheme.symmetric else torch.randint(-half, half, (n, groups), generator=generator).to(torch.int8)
    wide = codes.double().view(n, groups, -1)
    values = (wide if zeros is None else wide - zeros.double()[..., None]) * scales.double()[..., None]
    return PackedWeight.pack(Affine(codes, scales, zeros, scheme)), values.reshape(n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sums_of_whole_numbers_are_exact(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    for m, n, k in SIZES:
        w, values = weight(n, k, scheme)
        is_wide = scheme.bits == 8 and dtype == torch.float32
        x = whole_numbers(m, k, 32767, 3) if is_wide else whole_numbers(m, k, 127, 127)
        assert torch.equal(x.to(dtype), x)
        for rows in (m, m - 1):
            if scheme.bits == 8 and not is_wide and not (isa == "amx" and rows >= PAIRS_FROM):
                continue  # bf16 holds no 32767, and so no such numbers in 16 bits
            expected = (x[:rows].double() @ values.T).to(dtype)
            assert torch.equal(packed_linear(x[:rows].to(dtype), w), expected), (rows, n, k)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 32, code_book="fp4")], ids=str)
def test_a_row_among_many_equals_the_row_alone(isa: str, scheme: Scheme) -> None:
    k = 1152 if scheme.group_size else 1100
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(1))
    w = PackedWeight.pack(
        quantize(torch.randn(77, k, generator=torch.Generator().manual_seed(2)), scheme, torch.bfloat16)
    )
    for dtype in (torch.bfloat16, torch.float32):
        rows = x.to(dtype)
        alone, together = torch.cat([packed_linear(row[None], w) for row in rows]), packed_linear(rows, w)
        for m in (2, 5, 8, 9, 16, 17, 24, 32, 33, 34, 47, 48, 49, 64, 65, 101, 128, 129, 255, 257, 300):
            expected = together if isa == "amx" and dtype == torch.bfloat16 and m >= PAIRS_FROM else alone
            assert torch.equal(packed_linear(rows[:m], w), expected[:m]), m


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 32, code_book="fp4")], ids=str)
def test_many_rows_of_bf16_are_near_the_exact_product(isa: str, scheme: Scheme) -> None:
    """Rounding results to bf16 costs 0.0017 of their norm, W to bf16 as well 0.0024, and x to 8 bits 0.0056."""
    k = 1152 if scheme.group_size else 1100
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    w = PackedWeight.pack(
        quantize(torch.randn(77, k, generator=torch.Generator().manual_seed(6)), scheme, torch.bfloat16)
    )
    exact = x.double() @ w.dequantize(torch.float64).T
    most = 0.0028 if isa == "amx" or scheme.bits == 8 else 0.0065
    for m in (300, 131, 48):
        error = packed_linear(x[:m], w).double() - exact[:m]
        assert (error.norm(dim=1) <= 1.5 * most * exact[:m].norm(dim=1)).all(), m
        assert error.norm() <= most * exact[:m].norm(), m


def test_what_is_not_finite_stays_in_its_row(isa: str) -> None:
    w = PackedWeight.pack(quantize(torch.randn(40, 640), Scheme(4, 64), torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):
        for strange in (torch.inf, -torch.inf, torch.nan):
            x = torch.randn(90, 640).to(dtype)
            x[50, 333] = strange
            is_finite = packed_linear(x, w).isfinite()
            assert not is_finite[50].any()
            assert is_finite[:50].all()
            assert is_finite[51:].all()


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 32, code_book="fp4")], ids=str)
def test_instruction_sets_agree_to_the_last_bit(scheme: Scheme) -> None:
    k, before = 640, native.status().isa
    x = torch.randn(130, k, generator=torch.Generator().manual_seed(3))
    w = PackedWeight.pack(
        quantize(torch.randn(50, k, generator=torch.Generator().manual_seed(4)), scheme, torch.bfloat16)
    )
    found = {}
    try:
        for name in native.supported_isas():
            if name not in ("portable", "neon"):  # these round once more per block
                native.set_isa(name)
                found[name] = [packed_linear(x[:m], w) for m in (1, 6, 20, 130)]
    finally:
        native.set_isa(before)
    for name, results in found.items():
        for y, expected in zip(results, next(iter(found.values())), strict=True):
            assert torch.equal(y, expected), name
