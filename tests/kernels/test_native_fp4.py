"""MXFP4 weights: their bytes in files and in memory against plain loops over the formulas, and their extremes.

What holds for products with any packed weight, `test_native_packed.py` checks for these, too.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_native_block import isa
from torch import Tensor

from hf_accel.kernels import native, vendor
from hf_accel.kernels.packed import dequantized_linear, packed_linear
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import fp4
from hf_accel.ops.affine import Affine, Scheme, dequantize, quantize

__all__ = ["isa"]  # the fixture
FP4 = Scheme(4, 32, code_book="fp4")
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def stored(rows: int, groups: int, lowest: int = 100, highest: int = 140) -> tuple[Tensor, Tensor]:
    """Return random blocks and exponents as a file of `groups` groups per row holds them."""
    generator = torch.Generator().manual_seed(rows * groups)
    blocks = torch.randint(0, 256, (rows, 16 * groups), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(lowest, highest + 1, (rows, groups), generator=generator, dtype=torch.uint8)


def value(pattern: int) -> float:
    """The formula of E2M1: one sign, two bits of exponent with the bias 1, one of mantissa."""
    exponent, mantissa = pattern >> 1 & 3, pattern & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if pattern & 8 else size


def read(blocks: Tensor, exponents: Tensor) -> list[list[float]]:
    """Return the weight in plain loops."""
    patterns = [[byte >> shift & 15 for byte in row for shift in (0, 4)] for row in blocks.tolist()]
    return [
        [value(pattern) * 2.0 ** (scales[j // 32] - 127) for j, pattern in enumerate(row)]
        for row, scales in zip(patterns, exponents.tolist(), strict=True)
    ]


def test_values_are_those_of_the_formula() -> None:
    assert tuple(value(pattern) for pattern in range(8)) == MAGNITUDES
    assert [code / 2 for code in fp4.VALUES] == [value(pattern) for pattern in range(16)]
    for exponent in range(255):
        assert fp4.scales(torch.tensor([exponent], dtype=torch.uint8)).item() == 2.0 ** (exponent - 128)


@pytest.mark.parametrize(("rows", "groups"), [(16, 1), (1, 2), (19, 3), (48, 5)])
def test_a_weight_is_what_its_file_says(rows: int, groups: int) -> None:
    blocks, exponents = stored(rows, groups, 0, 254)
    weight = PackedWeight.from_mxfp4(blocks, exponents)
    weight.check()
    assert weight.shape == (rows, 32 * groups)
    assert weight.nbytes == -(-rows // 16) * 16 * groups * 17
    assert FP4.bits_per_weight(32 * groups) == 4.25
    expected = torch.tensor(read(blocks, exponents), dtype=torch.float64)
    assert torch.equal(weight.dequantize(torch.float64), expected.float().double())
    if rows >= 48:
        assert torch.equal(weight.slice(16, 40).dequantize(), weight.dequantize()[16:40])


def test_every_byte_lies_where_the_layout_says() -> None:
    blocks, exponents = stored(32, 3)
    weight = PackedWeight.from_mxfp4(blocks, exponents)
    for row in range(32):
        part, lane = row // 16, row % 16
        patterns = [byte >> shift & 15 for byte in blocks[row].tolist() for shift in (0, 4)]
        expected = [[patterns[8 * i + j] | patterns[8 * i + 4 + j] << 4 for j in range(4)] for i in range(12)]
        assert weight.codes[part, :, lane].tolist() == expected
        assert weight.scales[part, :, lane].tolist() == exponents[row].tolist()


def test_bits_come_back_with_the_signs_of_zeros() -> None:
    for rows, groups in ((16, 1), (5, 2), (33, 3)):
        blocks, exponents = stored(rows, groups, 0, 254)
        assert bool((blocks & 15 == 8).any()) or rows < 16
        again, scales = PackedWeight.from_mxfp4(blocks, exponents).to_mxfp4()
        assert torch.equal(again, blocks)
        assert torch.equal(scales, exponents)


def test_both_ways_to_pack_agree() -> None:
    blocks, exponents = stored(20, 2, 0, 254)
    blocks[blocks & 15 == 8] ^= 8
    blocks[blocks >> 4 == 8] ^= 128
    one = PackedWeight.from_mxfp4(blocks, exponents)
    other = PackedWeight.pack(one.unpack())
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_nan_and_what_is_no_fp4_value_are_refused() -> None:
    blocks, exponents = stored(16, 2)
    exponents[3, 1] = 255
    with pytest.raises(ValueError, match="NaN"):
        PackedWeight.from_mxfp4(blocks, exponents)
    for shape in ((16, 1), (15, 2)):
        with pytest.raises(ValueError, match="do not go with 16 rows of 64"):
            PackedWeight.from_mxfp4(blocks, torch.zeros(shape, dtype=torch.uint8))
    right = quantize(torch.ones(16, 32), FP4)
    for code in (5, -7, 13, -128):
        with pytest.raises(ValueError, match="a code of MXFP4 weights"):
            PackedWeight.pack(Affine(torch.full_like(right.codes, code), right.scales, None, FP4))
    for scale in (0.0, -1.0, 0.75, math.inf, math.nan, 2.0**127, 2.0**-129):
        with pytest.raises(ValueError, match="not a power of two"):
            PackedWeight.pack(Affine(right.codes, torch.full_like(right.scales, scale), None, FP4))
    for scheme in ((8, 32, True, "fp4"), (4, 64, True, "fp4"), (4, 32, False, "fp4"), (4, 32, True, "fp6")):
        with pytest.raises(ValueError, match="the code book 'fp4' goes with"):
            Scheme(*scheme)


def test_quantizing_takes_the_nearest_value_and_ties_to_the_even_pattern() -> None:
    between = [(low + high) / 2 for low, high in zip(MAGNITUDES, MAGNITUDES[1:])]
    even = [MAGNITUDES[i + i % 2] for i in range(7)]
    row = torch.tensor([6.0, *between, *(-v for v in between), 5.1, 4.9, 0.26, 0.24, -2.6]).repeat(2)[:32]
    found = dequantize(quantize(row[None], FP4))[0]
    expected = [6.0, *even, *(-v for v in even), 6.0, 4.0, 0.5, 0.0, -3.0]
    assert found[:20].tolist() == expected
    for scale in (2.0**-127, 2.0**-126, 2.0**-60, 1.0, 2.0**120):
        assert torch.equal(dequantize(quantize(row[None].double() * scale, FP4))[0], found * scale)


def test_quantizing_follows_the_rule_of_scales() -> None:
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(1))
    found = quantize(weight, FP4)
    largest = weight.view(64, 10, 32).abs().amax(-1)
    expected = [[2.0 ** (math.floor(math.log2(v)) - 3) for v in row] for row in largest.tolist()]
    assert found.scales.tolist() == expected
    error = (dequantize(found) - weight).view(64, 10, 32)
    units = 2 * found.scales[..., None]
    assert bool((error.abs() <= torch.where(weight.view(64, 10, 32).abs() > 6 * units, 2 * units, units)).all())
    assert bool(quantize(torch.zeros(16, 32), FP4).codes.eq(0).all())


@pytest.mark.native
def test_extreme_codes_and_exponents_are_exact(isa: str) -> None:
    """Sums of int16 that some instruction sets make wrap around in between, and must not be saturated."""
    alternating = torch.tensor([1.0, -1.0]).repeat(160)
    pairs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(80)
    x = torch.stack([torch.ones(320), -torch.ones(320), alternating, -alternating, pairs])
    signs = torch.stack([torch.ones(320), -torch.ones(320), alternating, pairs, -pairs]).repeat(4, 1)
    for exponent in (0, 1, 2, 127, 200):
        scale = fp4.scales(torch.tensor(exponent, dtype=torch.uint8)).item()
        quantized = Affine((12 * signs).to(torch.int8), torch.full((20, 10), scale), None, FP4)
        expected = x.double() @ dequantize(quantized, torch.float64).T
        found = packed_linear(x * 2.0**20, PackedWeight.pack(quantized)).double() * 2.0**-20
        assert bool(((found - expected).abs() <= 1e-6 * 320 * 12 * scale).all()), exponent


@pytest.mark.native
def test_every_pattern_counts_as_its_value(isa: str) -> None:
    blocks = (torch.arange(16)[:, None] * 17).expand(16, 16).to(torch.uint8).contiguous()
    weight = PackedWeight.from_mxfp4(blocks, torch.full((16, 1), 127, dtype=torch.uint8))
    for column in range(32):
        x = torch.zeros(1, 32)
        x[0, column] = 127.0
        assert packed_linear(x, weight)[0].tolist() == [127 * value(pattern) for pattern in range(16)]


@pytest.mark.native
def test_the_library_refuses_scales_of_another_kind() -> None:
    x = torch.ones(1, 64)
    for scheme, kind in ((FP4, torch.int32), (Scheme(4, 32), torch.uint8)):
        weight = PackedWeight.pack(quantize(torch.randn(16, 64), scheme))
        weight.scales = weight.scales.to(kind)
        with pytest.raises(ValueError, match="kernels cannot read"):
            weight.check()
        weight.check = lambda: None  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="does not take x"):
            native.packed_linear(x, weight.matrix(), 16)


def test_elsewhere_the_values_are_multiplied() -> None:
    weight, x = PackedWeight.from_mxfp4(*stored(40, 4)), torch.randn(3, 128, dtype=torch.float64)
    assert torch.equal(packed_linear(x, weight), x @ weight.dequantize(torch.float64).T)
    assert torch.equal(dequantized_linear(x, weight), packed_linear(x, weight))
    assert vendor.int4_product(weight.unpack()) is None
