"""Products in Triton against the same in float64: every format, sizes that fill no tile, what is joined to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (extra: test)")

from hf_accel.kernels.triton import linear, packed
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import products
from hf_accel.ops.affine import Scheme, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32 differs by the order of sums; the interpreter cuts bf16 values off instead of rounding them
BOUNDS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2.5e-2}
SCHEMES = {
    "4": Scheme(4, 64), "4, zeros": Scheme(4, 32, symmetric=False), "4, rows": Scheme(4), "8": Scheme(8),
    "8, zeros": Scheme(8, 32, symmetric=False), "2": Scheme(2, 32), "fp4": Scheme(4, 32, code_book="fp4"),
}  # fmt: skip


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def wide(values: list[Tensor]) -> list[Tensor]:
    return [value.double() for value in values]


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (3, torch.float32), (17, torch.float16)], ids=str
)
def test_dense_products_of_siblings(rows: int, dtype: torch.dtype) -> None:
    inner, sizes = 76, (20, 7, 33)
    x = torch.randn(1, rows, inner, device=DEVICE).to(dtype)
    weights = [torch.randn(n, inner + 4, device=DEVICE).to(dtype)[:, :inner] for n in sizes]  # rows further apart
    biases = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes]
    residual = torch.randn(1, rows, sum(sizes), device=DEVICE).to(dtype)
    found = linear.linear(x, weights, biases, residual, 0.5)
    expected = products.linear(x.double(), wide(weights), wide(biases), residual.double(), 0.5)
    assert difference(found, expected) < BOUNDS[dtype]
    assert difference(linear.linear(x, weights[:2]), products.linear(x.double(), wide(weights[:2]))) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("activation", "rows"), [("silu", 1), ("silu", 2), ("gelu_tanh", 1), ("gelu", 1), ("relu", 1)], ids=str
)
def test_gates_round_where_eager_code_does(activation: str, rows: int) -> None:
    x, gate, up = torch.randn(rows, 64).half(), torch.randn(18, 64).half(), torch.randn(18, 64).half()
    biases = [torch.randn(18).half(), torch.randn(18).half()]
    found = linear.gated(*(t.to(DEVICE) for t in (x, gate, up)), activation, [b.to(DEVICE) for b in biases]).cpu()
    expected = products.gated(x.double(), gate.double(), up.double(), activation, wide(biases))
    assert difference(found, expected) < BOUNDS[torch.float16]


def packed_weights(scheme: Scheme, inner: int, sizes: tuple[int, ...], scales: torch.dtype) -> list[PackedWeight]:
    made = [PackedWeight.pack(quantize(torch.randn(n, inner), scheme, scales)) for n in sizes]
    for weight in made:
        weight.codes, weight.scales = weight.codes.to(DEVICE), weight.scales.to(DEVICE)
        weight.offsets = None if weight.offsets is None else weight.offsets.to(DEVICE)
    return made


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_packed_products_of_siblings(name: str, rows: int) -> None:
    """Scales are bits of bf16 at 4 bits without zeros, and of fp32 elsewhere, which activations are too."""
    dtype, scales = (torch.bfloat16, torch.bfloat16) if name == "4" else (torch.float32, torch.float32)
    inner = 128
    weights = packed_weights(SCHEMES[name], inner, (32, 20), scales)
    x = torch.randn(rows, inner, device=DEVICE).to(dtype)
    biases = [torch.randn(weight.rows, device=DEVICE).to(dtype) for weight in weights]
    residual = torch.randn(rows, 52, device=DEVICE).to(dtype)
    values = [weight.dequantize(torch.float64) for weight in weights]
    found = packed.linear(x, weights, biases, residual)
    expected = products.linear(x.double(), values, wide(biases), residual.double())
    assert difference(found, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_gates(rows: int) -> None:
    weights = packed_weights(SCHEMES["4, zeros"], 64, (20, 20), torch.float32)
    x = torch.randn(rows, 64, device=DEVICE)
    values = [weight.dequantize(torch.float64) for weight in weights]
    found = packed.gated(x, *weights, "silu")
    assert difference(found, products.gated(x.double(), *values, "silu")) < BOUNDS[torch.float32]


def test_packed_rows_of_odd_length() -> None:
    """Columns are filled up to 32 in the layout; what lies there must not count."""
    for scheme in (Scheme(4), Scheme(8)):
        (weight,) = packed_weights(scheme, 41, (20,), torch.float32)
        for rows in (1, 2):
            x = torch.randn(rows, 41, device=DEVICE)
            expected = products.linear(x.double(), [weight.dequantize(torch.float64)])
            assert difference(packed.linear(x, [weight]), expected) < BOUNDS[torch.float32]


@pytest.mark.parametrize("rows", [3, 18])
def test_rows_may_lie_apart(rows: int) -> None:
    """As the last tokens of prompts do, of which the head makes logits."""
    (weight,) = packed_weights(Scheme(8), 64, (20,), torch.float32)
    dense = weight.dequantize(torch.float64)
    x = torch.randn(rows, 5, 64, device=DEVICE)[:, -1]
    expected = products.linear(x.double(), [dense])
    assert difference(packed.linear(x, [weight]), expected) < BOUNDS[torch.float32]
    assert difference(linear.linear(x, [dense.float()]), expected) < BOUNDS[torch.float32]


@pytest.mark.parametrize("rows", [1, 4])
def test_configurations_compute_the_same(rows: int) -> None:
    x = torch.randn(rows, 128, device=DEVICE)
    dense = torch.randn(40, 128, device=DEVICE)
    (weight,) = packed_weights(Scheme(4, 64), 128, (48,), torch.float32)
    wanted, expected = x.double() @ dense.double().T, products.linear(x.double(), [weight.dequantize(torch.float64)])
    sizes = {"num_warps": 4, "STAGES": 1}
    for block in (1, 8):
        config = {"BLOCK_N": block, "BLOCK_K": 64, **sizes}
        assert rows > 1 or difference(linear.linear(x, [dense], config=config), wanted) < 3e-6
    for block in (4, 16):
        config = {"BLOCK_N": 16, "BLOCK_J": block, **sizes}
        assert rows > 1 or difference(packed.linear(x, [weight], config=config), expected) < 3e-6
    for block in (16, 64):  # of tensor cores, which one row may use, too
        config = {"BLOCK_N": block, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
        assert difference(linear.linear(x, [dense], config=config), wanted) < 3e-6
        assert difference(packed.linear(x, [weight], config=config), expected) < 3e-6
