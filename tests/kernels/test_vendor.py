"""Torch's own products with packed weights, on the CPU's operators: right layouts, and none is trusted unseen."""

from __future__ import annotations

import pytest
import torch

from hf_accel.kernels import vendor
from hf_accel.kernels.packed import dequantized_linear, packed_linear
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme, quantize


def made(scheme: Scheme, n: int = 64, k: int = 256) -> Affine:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    return quantize(weight, scheme, torch.bfloat16)


def dense(weight: Affine) -> vendor.Product:
    packed = PackedWeight.pack(weight)
    return lambda x: dequantized_linear(x, packed)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(
    ("make", "scheme"),
    [(vendor.int4_product, Scheme(4, group)) for group in (32, 64, 128)] + [(vendor.int8_product, Scheme(8))],
)
def test_products_equal_the_dequantized_product(make, scheme: Scheme, rows: int) -> None:
    weight = made(scheme)
    x = torch.randn(rows, 256).bfloat16()
    expected = dense(weight)(x.float())
    found = make(weight)(x).float()
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_schemes_that_a_kernel_has_no_layout_for_are_left_alone() -> None:
    assert vendor.int4_product(made(Scheme(8))) is None
    assert vendor.int4_product(made(Scheme(4, 32, symmetric=False))) is None
    assert vendor.int8_product(made(Scheme(4, 32))) is None
    assert vendor.int8_product(made(Scheme(8, 32))) is None


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(8)])
def test_the_fastest_that_agrees_is_chosen(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made(scheme)
    plain = dense(weight)
    monkeypatch.setattr(vendor, "_seconds", lambda product, x: 2.0 if product is plain else 1.0)
    chosen = vendor.choose(weight, plain, torch.bfloat16)
    assert chosen is not None
    x = torch.randn(2, 256).bfloat16()
    assert (chosen(x) - plain(x)).float().norm() <= 1e-2 * plain(x).float().norm()
    monkeypatch.setattr(vendor, "_seconds", lambda product, x: 1.0 if product is plain else 2.0)
    assert vendor.choose(weight, plain, torch.bfloat16) is None


def test_a_kernel_that_is_wrong_or_missing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made(Scheme(8))
    plain = dense(weight)
    monkeypatch.setattr(vendor, "_seconds", lambda product, x: 2.0 if product is plain else 1.0)
    monkeypatch.setattr(vendor, "int8_product", lambda weight: lambda x: 1.1 * plain(x))
    assert vendor.choose(weight, plain, torch.bfloat16) is None

    def missing(weight: Affine) -> vendor.Product:
        raise NotImplementedError("no such operator here")

    monkeypatch.setattr(vendor, "int8_product", missing)
    assert vendor.choose(weight, plain, torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 128), Scheme(8)])
def test_packed_products_on_a_gpu(scheme: Scheme) -> None:
    packed = PackedWeight.pack(made(scheme, 256, 1024))
    moved = PackedWeight(scheme, 256, 1024, packed.codes.cuda(), packed.scales.cuda())
    for rows in (1, 5, 40):
        x = torch.randn(rows, 1024).bfloat16()
        expected = dequantized_linear(x.float(), packed)
        found = packed_linear(x.cuda(), moved).cpu().float()
        assert (found - expected).norm() <= 3e-2 * expected.norm()
        apart = torch.stack((torch.randn_like(x), x), dim=1).cuda()[:, 1:]  # as the last tokens of prompts lie
        found = packed_linear(apart, moved)[:, 0].cpu().float()
        assert (found - expected).norm() <= 3e-2 * expected.norm()
