"""Native products against float64, for every instruction set this machine has."""

from __future__ import annotations

import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels import native
from hf_accel.kernels.native import library

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
SIZES = ((1, 1), (7, 5), (33, 31), (64, 64), (577, 130), (1024, 67))


@pytest.fixture(params=native.supported_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> Any:
    before = native.status().isa
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_no_less_exact_than_aten(isa: str, dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, atens = [], []
    for rows in range(1, native.MAX_ROWS + 1):
        for k, n in SIZES:
            # a slice in both directions, so that rows start unaligned and the stride exceeds the length
            large = torch.randn((k, n + 4) if transposed else (n + 4, k + 5), generator=generator).to(dtype)
            weight = large[:, 3 : 3 + n] if transposed else large[1 : 1 + n, 3 : 3 + k]
            x = torch.randn(rows, k, generator=generator).to(dtype)
            bias = torch.randn(n, generator=generator).to(dtype) if rows % 2 else None
            matrix = weight.T if transposed else weight
            exact = functional.linear(x.double(), matrix.double(), None if bias is None else bias.double())
            y = native.linear(x, weight, bias, transposed=transposed)
            assert y.shape == (rows, n)
            assert y.dtype == dtype
            ours.append(error(y, exact))
            atens.append(error(functional.linear(x, matrix, bias), exact))
            assert ours[-1] <= 2 * max(atens[-1], torch.finfo(dtype).eps), (rows, k, n)
    assert sum(ours) <= 1.02 * sum(atens)


def test_a_row_does_not_depend_on_its_neighbours(isa: str) -> None:
    """To the last bit: a token verified among others, or batched, gets what it gets alone.

    With AMX long bf16 rows are an exception: one row alone is summed in another order than 2 to 16 rows are.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in native.DTYPES:
        for k, n in ((64, 64), (577, 131), (3000, 37)):
            weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((n, k), (n,)))
            conv1d = weight.T.contiguous()
            pair = isa == "amx" and dtype == torch.bfloat16 and k >= 512
            for rows in (2, 3, 4, 5, 7, 8, 11, 16, 27, 32):
                x = torch.randn(rows, k, generator=generator).to(dtype)
                together = native.linear(x, weight, bias)
                assert torch.equal(together[:, 5:9], native.linear(x, weight[5:9], bias[5:9]))
                turned = native.linear(x, conv1d, bias, transposed=True)
                for i in range(rows):
                    alone = x[i : i + 1].repeat(1 + pair, 1)
                    assert torch.equal(together[i], native.linear(alone, weight, bias)[0])
                    assert torch.equal(turned[i], native.linear(x[i], conv1d, bias, transposed=True))


def test_rows_are_equal_at_the_borders_of_sections_and_panels(isa: str) -> None:
    """Columns are summed in sections, and many rows go over panels of them: neither may show in a result."""
    generator = torch.Generator().manual_seed(1)
    for dtype in native.DTYPES:
        for k in (15, 256, 265, 511, 512, 513, 527, 528, 529, 1024, 1029, 1040, 1551):
            weight = torch.randn(67, k + 2, generator=generator).to(dtype)[:, 1 : k + 1]
            x = torch.randn(16, k, generator=generator).to(dtype)
            pair = isa == "amx" and dtype == torch.bfloat16 and k >= 512
            alone = torch.cat([native.linear(row.repeat(1 + pair, 1), weight)[:1] for row in x])
            for rows in (3, 8, 13) if isa == "portable" else range(1 + pair, 17):  # which is slow, and has no panels
                assert torch.equal(native.linear(x[:rows], weight), alone[:rows])


def test_any_number_of_rows(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype in native.DTYPES:
        for k, n in ((52, 67), (577, 19), (2100, 3)):
            weight = torch.randn(n, k + 2, generator=generator).to(dtype)[:, 1 : k + 1]
            bias = torch.randn(n, generator=generator).to(dtype)
            x = torch.randn(530, k, generator=generator).to(dtype)
            alone = torch.cat([native.linear(x[i : i + 16], weight, bias) for i in range(0, 530, 16)])
            for rows in (33, 100, 258, 530):  # but for a last one alone, which AMX sums in another order
                assert torch.equal(native.linear(x[:rows], weight, bias)[: rows // 2 * 2], alone[: rows // 2 * 2]), rows


def test_who_multiplies_many_rows_is_found_out_by_a_trial(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["hf_accel.kernels.native.linear"]
    assert native.best_rows(torch.float32) == native.FEW_ROWS, "ATen's are as fast as the machine"
    for ours, atens, expected in ((0.0, 0.05, None), (0.05, 0.0, native.FEW_ROWS)):
        module._is_faster_than_aten.cache_clear()
        slow = lambda seconds: lambda x, weight: seconds and time.sleep(seconds)  # noqa: E731  # sleep(0) lets others in
        monkeypatch.setattr(module, "linear", slow(ours))
        monkeypatch.setattr(module.functional, "linear", slow(atens))
        assert native.best_rows(torch.bfloat16) == expected
    module._is_faster_than_aten.cache_clear()


def test_batch_dimensions_and_strided_activations() -> None:
    weight = torch.randn(20, 12)
    x = torch.randn(2, 3, 24)[..., ::2]
    assert torch.allclose(native.linear(x, weight), functional.linear(x, weight), atol=1e-5)
    assert native.linear(x[:, -1:], weight).shape == (2, 1, 20)
    assert torch.allclose(native.linear(x[0, 0], weight), functional.linear(x[0, 0], weight), atol=1e-5)


def test_siblings_share_one_call(isa: str) -> None:
    for dtype in native.DTYPES:
        fused = torch.randn(100, 48).to(dtype)
        weights = [fused[:60], fused[60:81], fused[81:]]
        biases = [torch.randn(60).to(dtype), None, torch.randn(19).to(dtype)]
        x = torch.randn(2, 2, 48).to(dtype)
        for y, weight, bias in zip(native.linear_group(x, weights, biases), weights, biases):
            assert torch.equal(y, native.linear(x, weight, bias))


def test_nan_and_infinity_propagate(isa: str) -> None:
    for dtype in native.DTYPES:
        for transposed in (False, True):
            x, weight = torch.randn(2, 40).to(dtype), torch.randn(40, 40).to(dtype)
            x[1, 39] = math.nan
            y = native.linear(x, weight, transposed=transposed)
            assert y[0].isfinite().all()
            assert y[1].isnan().all()
            x[1, 39] = math.inf
            weight[weight == 0] = 1.0
            assert native.linear(x, weight, transposed=transposed)[1].isinf().all()
            large = torch.full((1, 64), torch.finfo(dtype).max, dtype=dtype)
            assert native.linear(large, torch.ones(3, 64).to(dtype)).isinf().all()  # overflow in the last rounding too


def test_rows_it_does_not_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="1 row or more"):
        native.linear(torch.randn(0, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match="transposed up to 32"):
        native.linear(torch.randn(33, 8), torch.randn(8, 4), transposed=True)
    with pytest.raises(ValueError, match="1 to 32 rows"):
        native.linear_group(torch.randn(33, 8), [torch.randn(4, 8)])
    with pytest.raises(ValueError, match="4 weights"):
        native.linear_group(torch.randn(1, 8), [torch.randn(4, 8)] * 5)


def test_calls_from_many_threads_do_not_disturb_each_other() -> None:
    weights = [torch.randn(300 + i, 400).bfloat16() for i in range(6)]
    x = torch.randn(3, 400).bfloat16()
    expected = [native.linear(x, weight) for weight in weights]

    def repeat(i: int) -> bool:
        return all(torch.equal(native.linear(x, weights[i]), expected[i]) for _ in range(100))

    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(repeat, range(6)))
    torch.set_num_threads(before)


def test_the_number_of_threads_does_not_change_the_result() -> None:
    weight, x = torch.randn(1000, 512), torch.randn(5, 512)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(native.linear(x, weight))
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_is_sound_and_traces(transposed: bool) -> None:
    x, weight, bias = torch.randn(3, 16), torch.randn(16, 16), torch.randn(16)
    operator = torch.ops.hf_accel.linear.default
    for b in (bias, None):
        torch.library.opcheck(operator, (x, weight, b, transposed))

    def function(x: Tensor) -> Tensor:
        return (
            native.linear(x, weight, bias, transposed=transposed).relu() + native.linear_group(x, [weight, weight])[1]
        )

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), function(x))


def test_the_environment_lowers_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.status().isa
    try:
        for asked, expected in (("portable", (True, "portable")), ("nonsense", (False, "none"))):
            monkeypatch.setenv("HF_ACCEL_ISA", asked)
            monkeypatch.setattr(library, "_loaded", None)
            status = native.status()
            assert (status.available, status.isa) == expected
            assert status.available or "HF_ACCEL_ISA=nonsense is not one of portable" in status.reason
        with pytest.raises(RuntimeError, match="HF_ACCEL_ISA=nonsense"):
            library.library()
    finally:
        monkeypatch.undo()
        native.set_isa(before)


def test_a_failure_to_load_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.status().isa
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setenv("HF_ACCEL_ISA", "nonsense")
    assert not native.is_available()
    monkeypatch.delenv("HF_ACCEL_ISA")
    assert not native.is_available(), "looked for at every call"
    monkeypatch.setattr(library, "_failed_at", -math.inf)  # a second later
    assert native.is_available()
    native.set_isa(before)


def test_an_instruction_set_the_machine_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="this machine has portable"):
        native.set_isa("sse")
