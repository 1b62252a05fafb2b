"""Methods of rounding: what all of them promise, and that a model gets the codes of its method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build
from torch import Tensor

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.ops.affine import Affine, Scheme, dequantize, quantize
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.observing import Moment
from hf_accel.quantization.rounding import METHODS
from hf_accel.quantization.rounding.nearest import nearest

SCHEMES = [Scheme(8), Scheme(8, 32), Scheme(4, 32), Scheme(4, 64), Scheme(4, 64, False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows: int = 40, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def moment(columns: int = 128) -> Moment:
    found = Moment.of(columns)
    found.add(torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(2)))
    return found


def same(one: Affine, two: Affine) -> bool:
    pairs = [(one.codes, two.codes), (one.scales, two.scales), (one.zeros, two.zeros)]
    return one.scheme == two.scheme and all(
        a is b if a is None or b is None else torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_weight_in_the_scheme(method: str, scheme: Scheme, dtype: torch.dtype) -> None:
    original = weight()
    found = METHODS[method](original, scheme, moment(), dtype)
    groups = 128 // scheme.columns_per_scale(128)
    assert torch.equal(original, weight()), "the weight is left as it was"
    assert found.scheme == scheme
    assert found.codes.dtype == torch.int8
    assert found.codes.shape == (40, 128)
    assert scheme.lowest <= int(found.codes.min()) <= int(found.codes.max()) <= scheme.highest
    assert found.scales.dtype == dtype
    assert found.scales.shape == (40, groups)
    assert (found.zeros is None) == scheme.symmetric
    assert found.zeros is None or (found.zeros.dtype == torch.int8 and found.zeros.shape == (40, groups))
    assert (dequantize(found) - original).norm() < 0.15 * original.norm()
    assert same(found, METHODS[method](original, scheme, moment(), dtype)), "the same each time"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nearest_is_what_affine_quantization_gives_without_text(scheme: Scheme, dtype: torch.dtype) -> None:
    expected = quantize(weight(), scheme, dtype)
    for observed in (None, moment()):
        assert same(nearest(weight(), scheme, observed, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_holds_the_codes_of_nearest(dtype: torch.dtype) -> None:
    model: Any = hf_accel.optimize(build("mistral", dtype), WeightOnlyConfig(bits=4, group_size=32))
    originals = dict(build("mistral", dtype).named_modules())
    products = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {module.scheme for module in products.values()} >= {Scheme(8), Scheme(4, 32)}
    for path, module in products.items():
        grouped = torch.float16 if dtype is torch.float16 else torch.bfloat16
        scales = dtype if module.scheme.group_size is None else grouped
        expected = nearest(originals[path].weight, module.scheme, None, scales)
        found = module.packed.unpack()
        assert torch.equal(found.codes, expected.codes), path
        assert torch.equal(found.scales.float(), expected.scales.float()), path
