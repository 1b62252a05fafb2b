"""The native decoder layer against the layers of transformers themselves, and against a textbook twin."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_twin import block_shape, changed, difference, inputs, random_block, twin

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock, Norm, Projection

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# fp32 differs by the order of sums alone; in 16 bits a flipped rounding moves a value by one ulp of an intermediate
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(params=native.supported_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> Any:
    before = native.status().isa
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def check(block: NativeBlock, arguments: dict[str, Any]) -> None:
    mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    found, expected = block(**mine), twin(block, **theirs)
    limit = TOLERANCES[block.dtype]
    assert difference(found, expected) < limit
    assert difference(mine["keys"], theirs["keys"]) < limit
    assert difference(mine["values"], theirs["values"]) < limit
    past, tokens = arguments["past"], arguments["hidden"].shape[1]
    for name in ("keys", "values"):  # nothing but the new positions is written
        untouched = [*range(past), *range(past + tokens, arguments[name].shape[2])]
        assert torch.equal(mine[name][:, :, untouched], arguments[name][:, :, untouched])


SMALL = block_shape()
SHAPES = {
    "gqa 3": SMALL,
    "mha, odd sizes": changed(SMALL, hidden=37, heads=2, kv_heads=2, head_dim=10, inner=23, scale=0.3),
    "gqa 4, D 64, gelu_tanh": changed(SMALL, hidden=96, heads=8, head_dim=64, activation="gelu_tanh", scale=0.125),
    "gqa 8, D 80, gelu": changed(SMALL, heads=8, kv_heads=1, head_dim=80, activation="gelu", scale=0.11),
    "gemma, D 256": changed(SMALL, heads=4, head_dim=256, activation="gelu_tanh", scale=0.0625, softcap=5.0),
    "D 128, relu": changed(SMALL, heads=2, kv_heads=1, head_dim=128, activation="relu", scale=0.09),
}


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_textbook_layer(isa: str, name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    gemma = "gemma" in name
    block = random_block(
        shape, dtype, bias="odd" in name, head_norms=gemma or "D 128" in name, out_norms=gemma, fused="gqa" in name,
        kind="rms_unit" if gemma else "rms",
    )  # fmt: skip
    for batch, tokens, past in ((1, 1, 0), (1, 1, 300), (2, 3, 17), (3, 1, 140)):
        check(block, inputs(shape, dtype, batch, tokens, past, rotary=6 if "odd" in name else None))


def test_rounds_where_the_eager_layer_rounds(isa: str) -> None:
    """Most values come out bit-equal in 16 bits; one rounding more or less on the way would change a third."""
    for dtype in (torch.float16, torch.bfloat16):
        for gemma in (False, True):
            shape, kind = replace(SMALL, activation="gelu_tanh" if gemma else "silu"), "rms_unit" if gemma else "rms"
            block = random_block(shape, dtype, bias=True, head_norms=gemma, out_norms=gemma, kind=kind)
            arguments = inputs(shape, dtype, 1, 16, 0)
            found, expected = block(**copy.deepcopy(arguments)), twin(block, **copy.deepcopy(arguments))
            assert (found != expected).float().mean() < 0.15  # 0 to 0.09 seen; 0.3 with one rounding left out


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_masks_windows_and_many_rows(isa: str, dtype: torch.dtype) -> None:
    block = random_block(SMALL, dtype)
    generator = torch.Generator().manual_seed(3)
    for batch, tokens, past, first in ((1, 16, 9, 0), (4, 8, 40, 0), (2, 1, 600, 470), (2, 13, 530, 3)):
        arguments = {**inputs(SMALL, dtype, batch, tokens, past), "first": first}
        if tokens == 1:
            check(block, arguments)
        length = past + tokens - first
        causal = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        holes = causal & (torch.rand(batch, 1, tokens, length, generator=generator) < 0.7)
        holes[..., : length // 3] = False  # left padding
        holes[-1, 0, 0] = False  # a query that sees nothing
        check(block, {**arguments, "mask": holes})
        check(block, {**arguments, "mask": holes[:1]})
        finite = torch.zeros(batch, 1, tokens, length, dtype=dtype).masked_fill(~holes, torch.finfo(dtype).min)
        check(block, {**arguments, "mask": finite[:, :, :, :]})
        bias = torch.randn(1, 1, tokens, length, generator=generator).to(dtype)
        check(block, {**arguments, "mask": bias})


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_tokens_together_equal_tokens_one_by_one(isa: str, dtype: torch.dtype) -> None:
    """To the last bit, for any number of threads: what makes verification of drafts lossless."""
    shape = replace(SMALL, hidden=200, inner=333, softcap=4.0)
    block = random_block(shape, dtype, head_norms=True)
    before = torch.get_num_threads()
    for batch, tokens, past in ((1, 4, 0), (2, 5, 250), (1, 16, 505), (4, 8, 20)):
        arguments = inputs(shape, dtype, batch, tokens, past)
        torch.set_num_threads(1)
        mine, single = copy.deepcopy(arguments), copy.deepcopy(arguments)
        together = block(**mine)
        torch.set_num_threads(3)
        for b in range(batch):
            for t in range(tokens):
                part = {name: single[name][b : b + 1] for name in ("keys", "values")}
                part |= {name: single[name][b : b + 1, t : t + 1].contiguous() for name in ("hidden", "cos", "sin")}
                assert torch.equal(block(**part, past=past + t)[0, 0], together[b, t])
        torch.set_num_threads(before)
        assert torch.equal(mine["keys"], single["keys"])


def test_buffers_may_be_strided_and_angles_shared() -> None:
    block = random_block(SMALL, torch.float32)
    arguments = inputs(SMALL, torch.float32, 2, 2, 30)
    cos, sin = arguments["cos"][:1], arguments["sin"][:1]
    plain = {name: arguments[name].clone() for name in ("keys", "values")}
    expected = block(**{**arguments, **plain, "cos": cos.repeat(2, 1, 1), "sin": sin.repeat(2, 1, 1)})
    strided = {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("keys", "values")}
    found = block(**{**arguments, **strided, "cos": cos, "sin": sin})
    assert torch.equal(found, expected)
    assert torch.equal(strided["keys"], plain["keys"])


def test_nan_and_infinity_stay_visible(isa: str) -> None:
    for dtype in native.DTYPES:
        block = random_block(SMALL, dtype)
        arguments = inputs(SMALL, dtype, 2, 1, 20)
        arguments["values"][1, 0, 7, 3] = math.nan
        out = block(**arguments)
        assert out[0].isfinite().all()
        assert out[1].isnan().all()
        for value in (math.nan, math.inf, -math.inf):  # what scores become of it is left to ATen
            arguments = inputs(SMALL, dtype, 2, 1, 20)
            arguments["keys"][0, :, 5] = value
            assert block(**arguments) is None


def test_many_threads_give_the_result_of_one() -> None:
    shape = changed(SMALL, hidden=512, heads=8, kv_heads=2, head_dim=64, inner=1024, scale=0.125)
    block = random_block(shape, torch.bfloat16)
    cases = [inputs(shape, torch.bfloat16, 1 + i % 2, 1 + i % 3, 40 * i) for i in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [block(**copy.deepcopy(case)) for case in cases]
    torch.set_num_threads(4)
    try:

        def repeat(index: int) -> bool:
            return all(torch.equal(block(**copy.deepcopy(cases[index])), expected[index]) for _ in range(6))

        assert all(repeat(index) for index in range(8))
        with ThreadPoolExecutor(4) as pool:  # calls of one block that overlap
            assert all(pool.map(repeat, range(8)))
    finally:
        torch.set_num_threads(before)


def test_copies_stand_on_their_own() -> None:
    block = random_block(SMALL, torch.float32)
    arguments = inputs(SMALL, torch.float32, 1, 1, 3)
    expected = block(**arguments)
    for duplicate in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(duplicate(**arguments), expected)
        duplicate.weights.projections[0].weight.zero_()
        assert not torch.equal(duplicate(**arguments), expected)
        assert torch.equal(block(**arguments), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"up": Projection(torch.randn(100, 72).half())}, "up.weight has dtype torch.float16"),
        ({"down": Projection(torch.randn(72, 200)[:, ::2])}, "down.weight has strides"),
        ({"o": Projection(torch.randn(72, 191))}, "o.weight has shape"),
        ({"q_norm": Norm(kind="rms", eps=1e-6, weight=torch.randn(31))}, "q_norm.weight has shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    block = random_block(SMALL, torch.float32)
    with pytest.raises(ValueError, match=message):
        NativeBlock(SMALL, replace(block.weights, **change))
    with pytest.raises(ValueError, match="head_dim is 512"):
        NativeBlock(replace(SMALL, head_dim=512), block.weights)


def test_calls_out_of_range_are_refused() -> None:
    block = random_block(SMALL, torch.float32)
    with pytest.raises(ValueError, match="1 row or more"):
        block(**inputs(SMALL, torch.float32, 1, 0, 0))
    arguments = inputs(SMALL, torch.float32, 1, 1, 0)
    with pytest.raises(ValueError, match="buffer of 6 positions"):
        block(**{**arguments, "past": 6})
