"""Scales of fp16 values, as GGUF files hold them, in 16 bits: products are to the bit those of the same in fp32."""

from __future__ import annotations

import pytest
import torch
from test_native_block import isa

from hf_accel.kernels.packed import dequantized_linear, packed_linear
from hf_accel.kernels.weights import PackedWeight, scale_values
from hf_accel.ops.affine import Affine, Scheme, quantize

__all__ = ["isa"]  # the fixture
SCHEMES = [Scheme(8, 32), Scheme(8), Scheme(4, 32), Scheme(4, 64), Scheme(3, 32), Scheme(2, 128)]


def packed(scheme: Scheme, rows: int = 50, columns: int = 256) -> tuple[PackedWeight, PackedWeight]:
    """Return a weight with scales of fp16, and the same with them in fp32."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight = PackedWeight.pack(quantize(values, scheme, torch.float16))
    assert weight.scales.dtype is torch.uint16
    wide = scale_values(weight.scales).view(torch.int32)
    return weight, PackedWeight(weight.scheme, weight.rows, weight.columns, weight.codes, wide, weight.offsets)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_those_of_wide_scales(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    weight, wide = packed(scheme)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert torch.equal(packed_linear(x, weight), packed_linear(x, wide))
        assert torch.equal(dequantized_linear(x, weight), dequantized_linear(x, wide))


@pytest.mark.native
@pytest.mark.parametrize("bits", [8, 4])
def test_offsets_that_are_no_multiples_of_scales_are_added(isa: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (40, 64), generator=generator, dtype=torch.int8)
    scales = torch.rand(40, 2, generator=generator).half().float()
    offsets = torch.randn(40, 2, generator=generator)
    weight = PackedWeight.pack(Affine(codes, scales, None, Scheme(bits, 32, symmetric=False), offsets))
    assert not weight.has_whole_zeros
    again = weight.unpack()
    assert again.zeros is None
    assert again.offsets is not None
    assert torch.equal(again.offsets, offsets)
    expected = codes.view(40, 2, 32).float() * scales[..., None] + offsets[..., None]
    assert torch.equal(weight.dequantize(), expected.view(40, 64))
    x = torch.randn(3, 64, generator=generator)
    difference = (packed_linear(x, weight) - x @ weight.dequantize().T).norm() / (x @ weight.dequantize().T).norm()
    assert difference < 1e-2


@pytest.mark.parametrize("scheme", [Scheme(8, 32), Scheme(4, 32), Scheme(2, 32)], ids=str)
def test_kernels_for_gpus_read_them(scheme: Scheme) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (extra: test)")
    from hf_accel.kernels.triton import packed as products

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight, wide = packed(scheme, 20, 64)
    for one in (weight, wide):
        one.codes, one.scales = one.codes.to(device), one.scales.to(device)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(products.linear(x, [weight]), products.linear(x, [wide]))
