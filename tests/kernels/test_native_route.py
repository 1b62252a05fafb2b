"""Routers in one native call against softmax and topk of torch, for every instruction set this machine has."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_native_block import isa
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels.native import Routing, route

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.native
SIZES = [(1, 64, 4, 2), (5, 100, 9, 4), (32, 544, 128, 8)]  # tokens, hidden, experts, choices


def drawn(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, hidden), (experts, hidden), (experts,))
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


def twin(logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
    """Return weights and ids, in fp32, of logits as they were rounded."""
    found = logits.float().softmax(dim=-1).topk(choices, dim=-1)
    return found.values / (found.values.sum(dim=-1, keepdim=True) if normed else 1), found.indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_routers_equal_their_twin(normed: bool, dtype: torch.dtype, isa: str) -> None:
    for (tokens, hidden, experts, choices), has_bias in product(SIZES, (False, True)):
        x, weight, bias = drawn(tokens, hidden, experts, dtype)
        given = bias if has_bias else None
        exact = Routing(normed, dtype, torch.float32)
        rows = [route(row, weight, given, choices, exact) for row in x.split(1)]
        decided = [place for place, row in enumerate(rows) if row is not None]
        assert len(decided) > 0.6 * tokens
        logits, weights, ids = (torch.cat(parts) for parts in zip(*filter(None, rows), strict=True))
        stock = functional.linear(x[decided], weight, given)
        assert logits.dtype is dtype
        assert float((logits.double() - stock.double()).norm() / stock.double().norm()) < 1e-2
        if normed:
            torch.testing.assert_close(weights, logits.float().gather(1, ids).softmax(dim=-1), rtol=1e-5, atol=1e-6)
        expected, chosen = twin(logits, choices, normed)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ids.sort(dim=-1).values, chosen.sort(dim=-1).values)
        rounded = route(x[decided], weight, given, choices, exact._replace(weights_dtype=dtype))
        assert rounded is None or torch.allclose(rounded[1], expected.to(dtype), rtol=2e-2)


def test_logits_can_have_more_digits() -> None:
    x, weight, _ = drawn(1, 64, 4, torch.bfloat16)
    short, long = (route(x, weight, None, 2, Routing(False, d, d)) for d in (torch.bfloat16, torch.float32))
    assert short is not None
    assert long is not None
    assert long[0].dtype is long[1].dtype is torch.float32
    assert torch.equal(long[0], short[0].float())


def test_a_choice_between_equals_is_left_to_torch() -> None:
    weight = torch.eye(6)
    routing = Routing(True, torch.float32, torch.float32)
    decided = route(torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0, 0.0]]), weight, None, 3, routing)
    assert decided is not None  # both are chosen
    assert decided[2].tolist() == [[0, 1, 2]]
    assert route(torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0, 0.0]]), weight, None, 2, routing) is None
    every = route(torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0, 0.0]]), weight, None, 6, routing)
    assert every is not None
    assert sorted(every[2][0].tolist()) == list(range(6))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_left_to_torch(value: float) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, value, 3.0]])
    assert route(x, torch.eye(3), None, 2, Routing(True, torch.float32, torch.float32)) is None


def test_sizes_out_of_range_are_refused() -> None:
    routing = Routing(True, torch.float32, torch.float32)
    for x, weight, choices in (
        (torch.ones(33, 4), torch.ones(8, 4), 2),
        (torch.ones(1, 4), torch.ones(513, 4), 2),
        (torch.ones(1, 4), torch.ones(8, 4), 9),
        (torch.ones(1, 4), torch.ones(8, 4), 0),
    ):
        with pytest.raises(ValueError, match="a native router takes 1 to 32 tokens"):
            route(x, weight, None, choices, routing)
