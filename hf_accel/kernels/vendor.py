"""Products with packed weights by the kernels that torch itself brings: int4 (tinygemm) and int8, mainly for GPUs.

They want layouts of their own, so each costs a copy of the codes on the device. None is trusted: a kernel is used for a
weight only after it gave, on this device and this weight, what the dequantized product gives, in less time. The layouts
are those of torch's operators of the same names. On an H100 the int4 one agreed and was faster, the int8 one was slower
than the dense product; the tests run this file on torch's CPU operators. Kernels of ours for GPUs, which read the codes
as they lie, are compared with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine
from hf_accel.ops.tolerances import ONE_PRODUCT

Product = Callable[[Tensor], Tensor]
_INNER_TILES = 8  # of tinygemm's layout: K is a multiple of 16 of them
_ROUNDS = 5


def int8_product(weight: Affine) -> Product | None:
    """x [M, K] -> [M, N] by `aten::_weight_int8pack_mm`; None for other schemes than 8 symmetric bits per channel."""
    if weight.scheme.bits != 8 or weight.scales.shape[1] != 1 or not weight.is_symmetric:
        return None
    codes, scales = weight.codes.contiguous(), weight.scales.flatten()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales.to(x.dtype))


def int4_product(weight: Affine) -> Product | None:
    """x [M, K] bf16 -> [M, N] by `aten::_weight_int4pack_mm`; None for all but whole symmetric 4 bits in groups."""
    n, k = weight.codes.shape
    group = k // weight.scales.shape[1]
    is_plain = weight.scheme.code_book is None and weight.is_symmetric
    if weight.scheme.bits != 4 or not is_plain or group not in (32, 64, 128):
        return None
    codes = (weight.codes + 8).to(torch.int32)
    scales = weight.scales.T.bfloat16()
    factors = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()  # [K / group, N, 2]
    aten = torch.ops.aten
    if weight.codes.is_cpu:
        packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return lambda x: aten._weight_int4pack_mm_for_cpu(x, packed, group, factors)
    if n % 8 or k % (16 * _INNER_TILES):
        return None
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
    return lambda x: aten._weight_int4pack_mm(x, packed, group, factors)


def choose(
    weight: Affine, dense: Product, dtype: torch.dtype, rows: int = 1, others: Sequence[Product] = ()
) -> Product | None:
    """Return the kernel that agrees with `dense` and is the fastest for so many rows; None where `dense` is.

    weight: on the device of the products; dense: the product on the dequantized weight; others: further kernels.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.codes.shape[1], generator=generator).to(weight.codes.device, dtype)
    expected = dense(x).double()
    best, least = None, _seconds(dense, x)
    for make in (*[lambda _, other=other: other for other in others], int4_product, int8_product):
        try:
            product = make(weight)
            found = None if product is None else product(x).double()
        except (RuntimeError, NotImplementedError, ImportError):  # not built for this device or dtype: no candidate
            continue
        if product is None or found is None or not (found - expected).norm() <= ONE_PRODUCT * expected.norm():
            continue
        seconds = _seconds(product, x)
        if seconds < least:
            best, least = product, seconds
    return best


def _seconds(product: Product, x: Tensor) -> float:
    times = []
    for _ in range(_ROUNDS):
        _synchronize(x)
        start = time.perf_counter()
        product(x)
        _synchronize(x)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
