"""Sequences of different lengths in one call of the native decoder layer: each comes out as it does alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from block_twin import changed, inputs, random_block
from test_native_block import SMALL, isa
from test_native_block_prompts import WIDE, packed
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# around the pieces of 256 positions: short and long ones, ends before, at and after a border, tokens on both sides
CASES = [
    (1, 0, [0, 0]),
    (1, 0, [600, 3, 255, 256, 257]),
    (1, 0, [0, 511, 512, 513]),
    (4, 0, [254, 5, 253, 770]),
    (8, 0, [300, 249]),
    (1, 200, [700, 200, 254, 256]),
    (3, 259, [515, 259, 513]),
    (5, 512, [512, 1030, 763]),
    (4, 0, [300, 9, 255, 256, 12, 77, 513, 30]),
]


def ragged(block: NativeBlock, tokens: int, first: int, pasts: list[int]) -> dict[str, Any]:
    """Arguments of a call whose buffers hold NaN from each row's end on, where nothing may read."""
    arguments = {**inputs(block.shape, block.dtype, len(pasts), tokens, max(pasts)), "first": first}
    for name in ("keys", "values"):
        for row, past in zip(arguments[name], pasts, strict=True):
            row[:, past:] = math.nan
            row[:, :first] = math.nan
    return {**arguments, "row_past": torch.tensor(pasts)}


def masks(dtype: torch.dtype, tokens: int, first: int, pasts: list[int]) -> dict[str, Tensor | None]:
    """Masks per row and shared; beyond a row's end they say that all is visible, and additive ones are NaN."""
    generator = torch.Generator().manual_seed(tokens + first)
    length = max(pasts) + tokens - first
    visible = torch.rand(len(pasts), 1, tokens, length, generator=generator) < 0.6
    for row, past in zip(visible, pasts, strict=True):
        own = past + tokens - first
        row[..., :own] &= torch.ones(tokens, own, dtype=torch.bool).tril(own - tokens)
        row[..., own:] = True
    visible[0, 0, 0, : pasts[0] + tokens - first] = False  # a query that sees nothing
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    for row, past in zip(bias, pasts, strict=True):
        row[..., past + tokens - first :] = math.nan
    shared = torch.randn(1, 1, tokens, length, generator=generator).to(dtype)
    return {"none": None, "bool": visible, "one bool": visible[:1], "additive": bias, "one additive": shared}


def check(block: NativeBlock, arguments: dict[str, Any], mask: Tensor | None) -> None:
    together, alone = copy.deepcopy(arguments), copy.deepcopy(arguments)
    found = block(**together, mask=mask)
    tokens, first = arguments["hidden"].shape[1], arguments["first"]
    for b, past in enumerate(arguments["row_past"].tolist()):
        part = {name: alone[name][b : b + 1] for name in ("hidden", "cos", "sin", "keys", "values")}
        row = None if mask is None else mask[b % mask.shape[0], None, :, :, : past + tokens - first]
        expected = block(**part, past=past, first=first, mask=row)
        assert expected.isfinite().all()
        assert torch.equal(found[b : b + 1], expected)
    for name in ("keys", "values"):  # the same positions are written, with the same values, and no others
        assert torch.equal(together[name].isnan(), alone[name].isnan())
        assert torch.equal(together[name].nan_to_num(), alone[name].nan_to_num())


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_every_row_is_bit_equal_to_that_row_alone(isa: str, dtype: torch.dtype) -> None:
    for shape in (SMALL, changed(SMALL, hidden=37, heads=8, kv_heads=1, head_dim=10, inner=23, softcap=3.0)):
        block = random_block(shape, dtype, head_norms=shape is SMALL)
        for tokens, first, pasts in CASES:
            arguments = ragged(block, tokens, first, pasts)
            for mask in masks(dtype, tokens, first, pasts).values():
                check(block, arguments, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_of_each_of_many_sequences(isa: str, dtype: torch.dtype) -> None:
    """With packed weights, whose products are the same beside any number of rows."""
    block = packed(random_block(WIDE, dtype, head_norms=True), 8)
    pasts = [300, 9, 255, 256, 12, 77, 513, 30] * 5
    for count in (33, 40):
        arguments = ragged(block, 1, 0, pasts[:count])
        for mask in masks(dtype, 1, 0, pasts[:count]).values():
            check(block, arguments, mask)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    # below 512 columns: from there on AMX sums several rows in another order than a single one
    shape = changed(SMALL, hidden=256, heads=6, kv_heads=3, head_dim=64, inner=480)
    block = random_block(shape, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens, first, pasts in CASES:
            check(block, ragged(block, tokens, first, pasts), None)
    finally:
        torch.set_num_threads(before)


def test_equal_pasts_are_the_plain_call() -> None:
    block = random_block(SMALL, torch.bfloat16)
    arguments = inputs(SMALL, torch.bfloat16, 3, 2, 300)
    plain, rows = copy.deepcopy(arguments), copy.deepcopy(arguments)
    assert torch.equal(block(**rows, row_past=torch.tensor([300] * 3)), block(**plain))
    assert torch.equal(rows["keys"], plain["keys"])


def test_scores_that_are_not_finite_end_the_call() -> None:
    """What ATen's attention makes of them depends on their number, so the layer's own forward is left to it."""
    block = random_block(SMALL, torch.float32)
    arguments = ragged(block, 1, 0, [300, 20])
    arguments["keys"][0, :, 5] = math.nan
    assert block(**arguments) is None
    arguments["keys"][0, :, 5] = 0.0
    assert block(**arguments).isfinite().all()


@pytest.mark.parametrize("pasts", [[-1, 40], [41, 40], [40, 2**62], [40, 9]], ids=str)
def test_lengths_out_of_range_are_refused(pasts: list[int]) -> None:
    block = random_block(SMALL, torch.float32)
    arguments = {**inputs(SMALL, torch.float32, 2, 1, 40), "first": 10}
    with pytest.raises(ValueError, match=r"by row: .*each from 10 to 40"):
        block(**arguments, row_past=torch.tensor(pasts))


@pytest.mark.parametrize(
    "row_past", [torch.tensor([3]), torch.tensor([3, 3], dtype=torch.int32), torch.tensor([3, 3, 3, 3])[::2]]
)
def test_lengths_of_another_kind_are_refused(row_past: Tensor) -> None:
    block = random_block(SMALL, torch.float32)
    with pytest.raises(ValueError, match="row_past must be contiguous int64"):
        block(**inputs(SMALL, torch.float32, 2, 1, 3), row_past=row_past)
