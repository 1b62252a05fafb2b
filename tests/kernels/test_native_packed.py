"""Products with packed weights of 8 to 2 bits and of MXFP4, for every instruction set this machine has.

Activations are rounded per 32 columns, to 65535 codes beside 8-bit weights and to 255 beside weights of fewer
bits; the bounds here follow from that rounding alone, and a twin in plain loops repeats it code by code.
"""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import block_twin
import pytest
import torch
from block_twin import difference, inputs, random_block, twin
from test_native_block import SMALL, TOLERANCES, isa
from torch import Tensor
from torch.nn.functional import linear

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock, Projection
from hf_accel.kernels.packed import dequantized_linear, packed_linear
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme, dequantize, quantize
from hf_accel.quantization import QuantizedLinear

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.native
EIGHT, FOUR, FP4 = Scheme(8), Scheme(4, 32), Scheme(4, 32, code_book="fp4")
SCHEMES = [EIGHT, Scheme(8, 32), FOUR, Scheme(4, 64), Scheme(4, 32, False)]
SCHEMES += [Scheme(3, 32), Scheme(3, 64, False), Scheme(2, 64), Scheme(2, 32, False), FP4]
TOP = {8: 32767.0, 4: 127.0, 3: 127.0, 2: 127.0}


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def packed(n: int, k: int, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PackedWeight:
    return PackedWeight.pack(quantize(gaussian(n, k, seed=seed), scheme, scale_dtype))


def columns(scheme: Scheme, odd: int) -> int:
    """Return `odd` columns where the scheme takes them, else as many groups as cover them."""
    group = scheme.group_size
    return odd if group is None else -(-odd // group) * group


def steps(x: Tensor, bits: int) -> Tensor:
    """The distance of two activation codes for each column of x [M, K]."""
    m, k = x.shape
    blocks_ = torch.nn.functional.pad(x.double(), (0, -k % 32)).view(m, -1, 32)
    return (blocks_.abs().amax(-1, keepdim=True) / TOP[bits]).expand_as(blocks_).reshape(m, -1)[:, :k]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_loses_nothing(scheme: Scheme, dtype: torch.dtype) -> None:
    for n, odd in ((16, 32), (1, 1), (17, 33), (50, 100), (31, 127), (64, 256)):
        k = columns(scheme, odd)
        quantized = quantize(gaussian(n, k), scheme, dtype)
        weight = PackedWeight.pack(quantized)
        assert weight.shape == (n, k)
        kind = torch.int16 if dtype is torch.bfloat16 else torch.int32
        assert weight.scales.dtype == (torch.uint8 if scheme == FP4 else kind)
        again = weight.unpack()
        assert torch.equal(again.codes, quantized.codes)
        assert torch.equal(again.scales, quantized.scales.float())
        assert (again.zeros is None) == scheme.symmetric
        assert again.zeros is None or quantized.zeros is None or torch.equal(again.zeros, quantized.zeros)
        assert torch.equal(weight.dequantize(), dequantize(quantized))


def test_extreme_codes_and_zeros_survive_packing() -> None:
    for bits in (4, 8):
        values = torch.arange(-(1 << bits - 1), 1 << bits - 1).to(torch.int8)
        codes = values.repeat(17, 2 if bits == 8 else 4)[:, torch.randperm(64 if bits == 4 else 512)].contiguous()
        zeros = values[torch.arange(17 * (codes.shape[1] // 32)) % len(values)].view(17, -1)
        quantized = Affine(codes, torch.rand(17, codes.shape[1] // 32) + 0.5, zeros, Scheme(bits, 32, False))
        again = PackedWeight.pack(quantized).unpack()
        assert torch.equal(again.codes, codes)
        assert again.zeros is not None
        assert torch.equal(again.zeros, zeros)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_slices_are_rows_on_the_same_memory(isa: str, scheme: Scheme) -> None:
    weight, x = packed(80, 128, scheme), gaussian(3, 128, seed=1)
    whole = packed_linear(x, weight)
    for start, stop in ((0, 80), (16, 48), (32, 45), (64, 80), (16, 17)):
        part = weight.slice(start, stop)
        assert part.shape == (stop - start, 128)
        assert part.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
        assert torch.equal(packed_linear(x, part), whole[:, start:stop])
        assert torch.equal(part.dequantize(), weight.dequantize()[start:stop])
        assert torch.equal(weight.unpack(start, stop).codes, weight.unpack().codes[start:stop])
    with pytest.raises(ValueError, match="rows from 8 on"):
        weight.slice(8, 24)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_further_off_than_rounded_activations_are(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    for m, n, odd in ((1, 16, 32), (2, 17, 33), (5, 50, 100), (16, 3, 1), (33, 70, 200), (3, 64, 1000)):
        k = columns(scheme, odd)
        x, weight = gaussian(m, k, seed=m).to(dtype), packed(n, k, scheme)
        bias = gaussian(n, seed=2).to(dtype) if m % 2 else None
        y = packed_linear(x, weight, bias)
        assert y.shape == (m, n)
        assert y.dtype == dtype
        w = weight.dequantize().double()
        exact = linear(x.double(), w, None if bias is None else bias.double())
        size = linear(x.double().abs(), w.abs(), None if bias is None else bias.double().abs())
        bound = 0.51 * steps(x, scheme.bits) @ w.abs().T
        bound += 1e-5 * size if scheme.symmetric else 4e-5 * size  # offsets cancel much of each sum
        bound += torch.finfo(dtype).eps * exact.abs()
        assert bool(((y.double() - exact).abs() <= bound).all()), (m, n, k)


def codes_of(row: list[float], bits: int) -> tuple[list[int], list[int], list[float]]:
    """Codes of one row of x, the same where product and addition are fused, and one scale per 32 columns."""
    plain, fused, scales = [], [], []
    for start in range(0, len(row), 32):
        block = torch.tensor(row[start : start + 32])
        largest = block.abs().max()
        inverse = torch.tensor(TOP[bits]) / largest if largest > 0 else torch.tensor(0.0)
        plain += [round(value) for value in (block * inverse).tolist()]
        fused += [round(value) for value in (block.double() * inverse.double()).tolist()]
        scales.append((largest / TOP[bits]).item())
    return plain, fused, scales


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_integer_sums_in_plain_loops(isa: str, scheme: Scheme) -> None:
    k = columns(scheme, 70)
    x, weight = gaussian(3, k, seed=5), packed(19, k, scheme)
    x[1, :32] = 0
    found, quantized = packed_linear(x, weight), weight.unpack()
    group = scheme.columns_per_scale(k)
    for m in range(3):
        codes, fused, scales = codes_of(x[m].tolist(), scheme.bits)
        for n in range(19):
            total = size = doubt = 0.0
            w, zeros = quantized.codes[n].tolist(), quantized.zeros
            for j in range(k):
                scale = quantized.scales[n, j // group].item() * scales[j // 32]
                code = w[j] - (0 if zeros is None else int(zeros[n, j // group]))
                total += codes[j] * code * scale
                size += abs(codes[j]) * (abs(w[j]) + abs(code - w[j])) * abs(scale)
                doubt += abs(codes[j] - fused[j]) * abs(code * scale)
            assert abs(found[m, n].item() - total) <= 1e-6 * size + doubt


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(isa: str, scheme: Scheme) -> None:
    for dtype in native.DTYPES:
        n, k = 37, columns(scheme, 90)
        x, weight, bias = gaussian(300, k).to(dtype), packed(n, k, scheme), gaussian(n).to(dtype)
        alone, together = (
            torch.cat([packed_linear(row[None], weight, bias) for row in x]),
            packed_linear(x, weight, bias),
        )
        for m in (*range(1, 21), 40, 255, 256, 257, 300):
            expected = together if isa == "amx" and dtype == torch.bfloat16 and m > 40 else alone  # see pair_tiles.h
            assert torch.equal(packed_linear(x[:m], weight, bias), expected[:m]), m
            assert torch.equal(packed_linear(x[300 - m :], weight, bias), expected[300 - m :]), m


@pytest.mark.parametrize("scheme", [EIGHT, FOUR, Scheme(4, 32, False)], ids=str)
def test_the_number_of_threads_does_not_change_the_result(isa: str, scheme: Scheme) -> None:
    weight, x = packed(410, 704, scheme), gaussian(300, 704)
    before = torch.get_num_threads()
    try:
        for m in (1, 3, 17, 300):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(packed_linear(x[:m], weight))
            assert all(torch.equal(y, results[0]) for y in results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shapes_and_strides_of_activations(isa: str, scheme: Scheme) -> None:
    weight = packed(20, 64, scheme)
    x = gaussian(2, 3, 128)
    every_second = x[..., ::2]
    assert torch.equal(packed_linear(every_second, weight), packed_linear(every_second.contiguous(), weight))
    turned = gaussian(64, 5).T
    assert torch.equal(packed_linear(turned, weight), packed_linear(turned.contiguous(), weight))
    assert packed_linear(every_second[0, 0], weight).shape == (20,)
    assert packed_linear(x[:, :0, :64], weight).shape == (2, 0, 20)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_give_the_bias(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    weight, bias = packed(20, 64, scheme), gaussian(20).to(dtype)
    for m in (1, 6):
        x = torch.zeros(m, 64, dtype=dtype)
        assert torch.equal(packed_linear(x, weight, bias), bias.expand(m, -1))
        assert bool(packed_linear(x, weight).eq(0).all())


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_an_outlier_costs_its_own_block_only(isa: str, scheme: Scheme) -> None:
    """Beside columns of zeros it costs nothing, as it would if a row of x had one scale."""
    w, x = gaussian(20, 128), gaussian(2, 128)
    w[:, 32:64] = 0
    weight = PackedWeight.pack(quantize(w, scheme, torch.bfloat16))
    plain = packed_linear(x, weight)
    x[1, 40] = 1e6
    assert torch.equal(packed_linear(x, weight), plain)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nan_and_infinity_stay_in_their_row(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    weight, x = packed(20, columns(scheme, 70), scheme), gaussian(6, columns(scheme, 70)).to(dtype)
    clean = packed_linear(x, weight)
    for value in (math.nan, math.inf, -math.inf):
        for column in (0, 31, 64, 69):
            spoilt = x.clone()
            spoilt[2, column] = value
            y = packed_linear(spoilt, weight)
            assert not y[2].isfinite().any()
            for row in (0, 1, 3, 4, 5):
                assert torch.equal(y[row], clean[row])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tiny_activations_stay_finite(isa: str, scheme: Scheme) -> None:
    """Blocks whose largest value is below about 1e-34 count as zeros; what lies beside them does not."""
    weight, x = packed(20, 64, scheme), gaussian(5, 64)
    w = weight.dequantize().double()
    x[0] *= 1e-30
    x[1] *= 1e-40
    x[2, :32] *= 1e-38
    x[3] = 1e-45
    y, exact = packed_linear(x, weight).double(), x.double() @ w.T
    bound = 0.51 * steps(x, scheme.bits) @ w.abs().T + 1e-5 * (x.double().abs() @ w.abs().T) + 1e-32
    assert bool(((y - exact).abs() <= bound).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_codes_do_not_overflow(isa: str, bits: int) -> None:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    alternating = torch.tensor([1.0, -1.0]).repeat(160)
    pairs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(80)
    x = torch.stack([torch.ones(320), -torch.ones(320), alternating, -alternating, pairs])
    signs = torch.stack([torch.ones(320), -torch.ones(320), alternating, pairs]).repeat(5, 1)
    codes = torch.where(signs > 0, high, low).to(torch.int8)
    for group in (None, 32) if bits == 8 else (32, 64):
        scales = torch.ones(20, 1 if group is None else 320 // group)
        weight = PackedWeight.pack(Affine(codes, scales, None, Scheme(bits, group)))
        exact = x.double() @ codes.double().T
        assert bool(((packed_linear(x, weight).double() - exact).abs() <= 2e-6 * 320 * -low).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantized_products_round_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = packed(100, 128, scheme), gaussian(100)
    for x in (gaussian(7, 128), gaussian(2, 3, 128).double(), gaussian(4, 128).bfloat16()):
        b = bias.to(x.dtype)
        expected = linear(x, weight.dequantize(x.dtype), b)
        assert torch.equal(dequantized_linear(x, weight, b), expected)
        with monkeypatch.context() as patch:
            patch.setattr("hf_accel.kernels.packed._BLOCK_BYTES", 128 * 4 * 32)  # blocks of 16 to 64 rows
            in_parts = dequantized_linear(x, weight, b)
        assert difference(in_parts, expected) < 2 * torch.finfo(x.dtype).eps
    assert torch.equal(packed_linear(gaussian(2, 128).double(), weight), linear(gaussian(2, 128).double(),
                       weight.dequantize(torch.float64)))  # fmt: skip


def test_copies_and_moved_memory_are_followed() -> None:
    """C keeps addresses; copies of the Python object and tensors whose memory moved must not read the old ones."""
    x = gaussian(2, 64)
    for scheme in (FOUR, Scheme(4, 32, False)):
        weight = packed(20, 64, scheme)
        expected = packed_linear(x, weight)
        for duplicate in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
            assert torch.equal(packed_linear(x, duplicate), expected)
            duplicate.scales.zero_()
            assert scheme.symmetric == bool(packed_linear(x, duplicate).eq(0).all())
            assert torch.equal(packed_linear(x, weight), expected)
        module = QuantizedLinear(weight, None, torch.float32)
        assert torch.equal(module(x), expected)
        module.share_memory()
        weight.codes.fill_(0x88)  # every code zero; the module shares this tensor
        assert torch.equal(module(x), packed_linear(x, packed_zeros(weight)))
        module.codes.data = packed(20, 64, scheme).codes
        assert torch.equal(module(x), expected)


def packed_zeros(weight: PackedWeight) -> PackedWeight:
    codes = torch.full_like(weight.codes, 0x88)
    return PackedWeight(weight.scheme, weight.rows, weight.columns, codes, weight.scales.clone(), weight.offsets)


SHAPE = replace(SMALL, hidden=96, inner=160)
MIXTURES: dict[str, dict[str, Scheme | None]] = {
    "8 bits": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), EIGHT),
    "4 bits": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), FOUR),
    "mixed": {"q": FOUR, "k": None, "v": EIGHT, "o": Scheme(4, 64), "gate": EIGHT, "up": FOUR, "down": None},
    "3 bits": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), Scheme(3, 32)),
    "2 bits": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), Scheme(2, 32)),
    "MXFP4": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), FP4),
    "each product its own": {
        "q": Scheme(3, 32),
        "k": Scheme(2, 32, False),
        "v": FP4,
        "o": Scheme(2, 64),
        "gate": Scheme(2, 32),
        "up": Scheme(3, 32, False),
        "down": Scheme(3, 32),
    },
    "asymmetric": {"q": None, "k": Scheme(4, 32, False), "v": FOUR, "down": Scheme(4, 32, False)},
}


def packed_block(mixture: dict[str, Scheme | None], dtype: torch.dtype, bias: bool = True) -> NativeBlock:
    """Return a block whose projections named in `mixture` are packed."""
    dense = random_block(SHAPE, dtype, bias=bias).weights
    parts: dict[str, Any] = dict(zip("qkv", dense.projections)) | {name: getattr(dense, name) for name in vars(dense)}
    for name, scheme in mixture.items():
        if scheme is not None:
            weight = PackedWeight.pack(quantize(parts[name].weight, scheme, torch.bfloat16))
            parts[name] = Projection(weight, parts[name].bias)
    parts["projections"] = tuple(parts.pop(name) for name in "qkv")
    return NativeBlock(SHAPE, replace(dense, **parts))


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_native_layer_computes_what_its_modules_do(
    isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(x: Tensor, projection: Projection) -> Tensor:
        if isinstance(projection.weight, PackedWeight):
            return QuantizedLinear(projection.weight, projection.bias, dtype)(x)
        return linear(x, projection.weight, projection.bias)

    monkeypatch.setattr(block_twin, "product", product)
    block = packed_block(MIXTURES[name], dtype)
    # a last bit may send an activation to the next of 65535 or 255 codes
    limit = max(1e-4 if name == "8 bits" else 5e-3, TOLERANCES[dtype])
    for batch, tokens, past in ((1, 1, 0), (2, 3, 17), (1, 16, 40)):
        arguments = inputs(SHAPE, dtype, batch, tokens, past)
        mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
        assert difference(block(**mine), twin(block, **theirs)) < limit
        assert difference(mine["keys"], theirs["keys"]) < limit
        assert difference(mine["values"], theirs["values"]) < limit


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_together_equal_tokens_one_by_one(isa: str, name: str) -> None:
    for dtype in native.DTYPES:
        block = packed_block(MIXTURES[name], dtype)
        arguments = inputs(SHAPE, dtype, 1, 7, 20)
        single = copy.deepcopy(arguments)
        together = block(**arguments)
        for t in range(7):
            part = {key: single[key][:, t : t + 1].contiguous() for key in ("hidden", "cos", "sin")}
            out = block(**part, keys=single["keys"], values=single["values"], past=20 + t)
            assert torch.equal(out[0, 0], together[0, t])


def test_copies_of_a_native_layer_stand_on_their_own() -> None:
    block = packed_block(MIXTURES["mixed"], torch.float32)
    arguments = inputs(SHAPE, torch.float32, 1, 1, 3)
    expected = block(**arguments)
    for duplicate in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(duplicate(**arguments), expected)
        for part in (0, 2):
            duplicate.weights.projections[part].weight.codes.zero_()
        assert not torch.equal(duplicate(**arguments), expected)
        assert torch.equal(block(**arguments), expected)


def test_packed_weights_that_do_not_fit_are_named() -> None:
    block = packed_block(MIXTURES["mixed"], torch.float32)
    with pytest.raises(ValueError, match=r"up\.weight has shape"):
        NativeBlock(SHAPE, replace(block.weights, up=Projection(packed(160, 64, FOUR))))
