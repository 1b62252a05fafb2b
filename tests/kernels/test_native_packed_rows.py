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


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sums_of_whole_numbers_are_exact(isa: str, scheme: Scheme) -> None:
    for m, n, k in SIZES:
        w, values = weight(n, k, scheme)
        x = whole_numbers(m, k, 32767, 3) if scheme.bits == 8 else whole_numbers(m, k, 127, 127)
        for rows in (m, m - 1):
            assert torch.equal(packed_linear(x[:rows], w).double(), x[:rows].double() @ values.T), (rows, n, k)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 32, code_book="fp4")], ids=str)
def test_a_row_among_many_equals_the_row_alone(isa: str, scheme: Scheme) -> None:
    k = 1152 if scheme.group_size else 1100
    x = torch.randn(200, k, generator=torch.Generator().manual_seed(1))
    w = PackedWeight.pack(
        quantize(torch.randn(77, k, generator=torch.Generator().manual_seed(2)), scheme, torch.bfloat16)
    )
    for dtype in (torch.bfloat16, torch.float32):
        rows = x.to(dtype)
        chosen = (0, 3, 7, 8, 15, 16, 31, 32, 100)
        alone = [packed_linear(rows[i : i + 1], w)[0] for i in chosen]
        for m in (2, 5, 8, 9, 16, 17, 24, 32, 33, 34, 101, 128, 129, 200):
            together = packed_linear(rows[:m], w)
            for i, expected in zip(chosen, alone, strict=True):
                assert i >= m or torch.equal(together[i], expected), (m, i)


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
