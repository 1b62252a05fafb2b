"""The layout of packed weights, bit by bit against plain loops over what csrc/native.h says, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_accel.kernels.layout import LANES, QUANTUM, codes_shape, interleaved, row_by_row
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme, dequantize, quantize

BITS = (2, 3, 4, 8)
SCHEMES = [Scheme(3, 32), Scheme(3, 64, False), Scheme(3, 128), Scheme(2, 32, False), Scheme(2, 64), Scheme(2, 128)]


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns + bits)
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=generator, dtype=torch.int8)


def stored(codes: list[int], bits: int) -> list[list[list[int]]]:
    """Return the bytes of one row, for each place along it where they lie."""
    above = [code + (1 << bits - 1) for code in codes]
    if bits == 8:
        return [[[codes[i] & 255, codes[i + 1] & 255]] for i in range(0, len(codes), 2)]
    if bits == 4:
        return [[[above[i + j] | above[i + 4 + j] << 4 for j in range(4)]] for i in range(0, len(codes), 8)]
    if bits == 2:
        return [
            [[above[i + j] | above[i + 4 + j] << 2 | above[i + 8 + j] << 4 | above[i + 12 + j] << 6 for j in range(4)]]
            for i in range(0, len(codes), 16)
        ]
    found = []
    for i in range(0, len(codes), 32):
        parts = [[above[i + 8 * p + j] | above[i + 8 * p + 4 + j] << 3 for j in range(4)] for p in range(3)]
        for j in range(4):
            first, second = above[i + 24 + j], above[i + 28 + j]
            parts[0][j] |= (first >> 1) << 6
            parts[1][j] |= (second >> 1) << 6
            parts[2][j] |= (first & 1) << 6 | (second & 1) << 7
        found.append(parts)
    return found


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_lies_where_the_layout_says(bits: int) -> None:
    codes = random_codes(2 * LANES, 3 * QUANTUM, bits)
    found = interleaved(codes, bits)
    assert found.shape == codes_shape(2 * LANES, 3 * QUANTUM, bits)
    assert found.is_contiguous()
    assert found.numel() * 8 == codes.numel() * bits, "no bit is wasted"
    for row in range(2 * LANES):
        lane = found.view(torch.uint8)[row // LANES].unsqueeze(1) if bits != 3 else found[row // LANES]
        assert lane[:, :, row % LANES].tolist() == stored(codes[row].tolist(), bits), row


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back(bits: int) -> None:
    for rows, columns in ((16, 32), (48, 64), (16, 160)):
        codes = random_codes(rows, columns, bits)
        assert torch.equal(row_by_row(interleaved(codes, bits), bits), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_loses_nothing(scheme: Scheme) -> None:
    for rows, groups in ((16, 1), (1, 2), (17, 3), (50, 1)):
        columns = groups * scheme.columns_per_scale(0)
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        for dtype in (torch.bfloat16, torch.float32):
            quantized = quantize(weight, scheme, dtype)
            packed = PackedWeight.pack(quantized)
            packed.check()
            assert packed.codes.shape == codes_shape(rows, columns, scheme.bits)
            again = packed.unpack()
            assert torch.equal(again.codes, quantized.codes)
            assert torch.equal(again.scales, quantized.scales.float())
            assert again.zeros is None or quantized.zeros is None or torch.equal(again.zeros, quantized.zeros)
            assert torch.equal(packed.dequantize(), dequantize(quantized))


@pytest.mark.parametrize("bits", [2, 3])
def test_the_signed_extreme_is_the_lowest_code(bits: int) -> None:
    """So scales are negative where it is positive, and nothing below it in magnitude is clipped on its side."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    found = quantize(weight, Scheme(bits, 32))
    grouped, codes = weight.view(64, 4, 32), found.codes.view(64, 4, 32)
    at = grouped.abs().argmax(-1, keepdim=True)
    assert bool(codes.gather(-1, at).eq(-(1 << bits - 1)).all())
    extreme = grouped.gather(-1, at).squeeze(-1)
    assert torch.equal(found.scales < 0, extreme > 0)
    assert torch.allclose(found.scales * -(1 << bits - 1), extreme)


@pytest.mark.parametrize("bits", [2, 3])
def test_extreme_codes_zeros_and_negative_scales_survive(bits: int) -> None:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = torch.tensor([low, high], dtype=torch.int8).repeat(17, 32)
    zeros = torch.tensor([low, high], dtype=torch.int8).repeat(17, 1)
    scales = torch.tensor([0.5, -0.25]).repeat(17, 1)
    again = PackedWeight.pack(Affine(codes, scales, zeros, Scheme(bits, 32, False))).unpack()
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, scales)
    assert again.zeros is not None
    assert torch.equal(again.zeros, zeros)


def test_tensors_of_another_layout_are_refused() -> None:
    for scheme in (Scheme(3, 32), Scheme(2, 32)):
        packed = PackedWeight.pack(quantize(torch.randn(16, 64), scheme))
        packed.codes = packed.codes.flatten(1)
        with pytest.raises(ValueError, match="kernels cannot read"):
            packed.check()
