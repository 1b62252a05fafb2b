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
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from hf_accel.kernels import native
from hf_accel.kernels.native import BlockShape, BlockWeights, NativeBlock, Projection

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# fp32 differs by the order of sums alone; in 16 bits a flipped rounding moves a value by one ulp of an intermediate
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
GATES = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"), "gelu": gelu, "relu": relu}


@pytest.fixture(params=native.supported_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> Any:
    before = native.status().isa
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius distance; infinite where only one of both is finite."""
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def random_block(
    shape: BlockShape,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    head_norms: bool = False,
    out_norms: bool = False,
    fused: bool = False,
    seed: int = 0,
) -> NativeBlock:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*size: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    def projection(rows: int, columns: int) -> Projection:
        weight = tensor(rows + 3, columns + 5)[1 : rows + 1, 2 : columns + 2] if fused else tensor(rows, columns)
        return Projection(weight, tensor(rows) if bias else None)

    def norm(size: int) -> Tensor:
        return (tensor(size) + (1.0 if shape.norm_style == "llama" else 0.0)).to(dtype)

    e, i, d = shape.hidden, shape.inner, shape.head_dim
    q, kv = shape.heads * d, shape.kv_heads * d
    weights = BlockWeights(
        q=projection(q, e), k=projection(kv, e), v=projection(kv, e), o=projection(e, q), gate=projection(i, e),
        up=projection(i, e), down=projection(e, i), input_norm=norm(e), mlp_norm=norm(e),
        attention_out_norm=norm(e) if out_norms else None, mlp_out_norm=norm(e) if out_norms else None,
        q_norm=norm(d) if head_norms else None, k_norm=norm(d) if head_norms else None,
    )  # fmt: skip
    return NativeBlock(shape, weights)


def rms_norm(x: Tensor, weight: Tensor | None, shape: BlockShape) -> Tensor:
    if weight is None:
        return x
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + shape.norm_eps)
    if shape.norm_style == "gemma":
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, D]; cos, sin [B, T, rotary]."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    half = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
    return torch.cat((turned * cos[:, :, None] + half * sin[:, :, None], rest), -1)


def twin(
    block: NativeBlock,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    first: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """The same layer as a textbook writes it: one query at a time, explicit softmax. Writes keys and values."""
    shape, w = block.shape, block.weights
    batch, tokens, _ = hidden.shape
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    h = rms_norm(hidden, w.input_norm, shape)
    q = linear(h, w.q.weight, w.q.bias).view(batch, tokens, -1, d)
    k = linear(h, w.k.weight, w.k.bias).view(batch, tokens, -1, d)
    v = linear(h, w.v.weight, w.v.bias).view(batch, tokens, -1, d)
    q, k = rotate(rms_norm(q, w.q_norm, shape), cos, sin), rotate(rms_norm(k, w.k_norm, shape), cos, sin)
    keys[:, :, past : past + tokens] = k.transpose(1, 2)
    values[:, :, past : past + tokens] = v.transpose(1, 2)
    mixed = torch.zeros(batch, tokens, shape.heads, d, dtype=hidden.dtype)
    for b in range(batch):
        for t in range(tokens):
            for head in range(shape.heads):
                end = past + tokens if mask is not None else past + t + 1
                seen = slice(first, end)
                scores = keys[b, head // group, seen].float() @ q[b, t, head].float() * shape.scale
                if shape.softcap is not None:
                    scores = shape.softcap * torch.tanh(scores / shape.softcap)
                if mask is not None:
                    row = mask[b % mask.shape[0], 0, t]
                    scores = scores.masked_fill(~row, -math.inf) if row.dtype is torch.bool else scores + row.float()
                if scores.isneginf().all():
                    continue
                mixed[b, t, head] = (scores.softmax(-1) @ values[b, head // group, seen].float()).to(hidden.dtype)
    out = linear(mixed.flatten(2), w.o.weight, w.o.bias)
    hidden = hidden + rms_norm(out, w.attention_out_norm, shape)
    h = rms_norm(hidden, w.mlp_norm, shape)
    gate = GATES[shape.activation](linear(h, w.gate.weight, w.gate.bias))
    out = linear(gate * linear(h, w.up.weight, w.up.bias), w.down.weight, w.down.bias)
    return hidden + rms_norm(out, w.mlp_out_norm, shape)


def inputs(
    shape: BlockShape, dtype: torch.dtype, batch: int, tokens: int, past: int, rotary: int | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch + 10 * tokens + past)
    size = (batch, shape.kv_heads, past + tokens + 5, shape.head_dim)
    angles = torch.rand(batch, tokens, (rotary or shape.head_dim) // 2, generator=generator).mul(6).repeat(1, 1, 2)
    return {
        "hidden": torch.randn(batch, tokens, shape.hidden, generator=generator).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": torch.randn(size, generator=generator).to(dtype),
        "values": torch.randn(size, generator=generator).to(dtype),
        "past": past,
    }


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


SMALL = BlockShape(
    hidden=72,
    heads=6,
    kv_heads=2,
    head_dim=32,
    inner=100,
    activation="silu",
    norm_eps=1e-6,
    norm_style="llama",
    scale=32**-0.5,
)
SHAPES = {
    "gqa 3": SMALL,
    "mha, odd sizes": replace(SMALL, hidden=37, heads=2, kv_heads=2, head_dim=10, inner=23, scale=0.3),
    "gqa 4, D 64, gelu_tanh": replace(SMALL, hidden=96, heads=8, head_dim=64, activation="gelu_tanh", scale=0.125),
    "gqa 8, D 80, gelu": replace(SMALL, heads=8, kv_heads=1, head_dim=80, activation="gelu", scale=0.11),
    "gemma, D 256": replace(
        SMALL, heads=4, head_dim=256, norm_style="gemma", activation="gelu_tanh", scale=0.0625, softcap=5.0
    ),
    "D 128, relu": replace(SMALL, heads=2, kv_heads=1, head_dim=128, activation="relu", scale=0.09),
}


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_textbook_layer(isa: str, name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    gemma = shape.norm_style == "gemma"
    block = random_block(
        shape, dtype, bias="odd" in name, head_norms=gemma or "D 128" in name, out_norms=gemma, fused="gqa" in name
    )
    for batch, tokens, past in ((1, 1, 0), (1, 1, 300), (2, 3, 17), (3, 1, 140)):
        check(block, inputs(shape, dtype, batch, tokens, past, rotary=6 if "odd" in name else None))


def test_rounds_where_the_eager_layer_rounds(isa: str) -> None:
    """Most values come out bit-equal in 16 bits; one rounding more or less on the way would change a third."""
    for dtype in (torch.float16, torch.bfloat16):
        for gemma in (False, True):
            shape = replace(
                SMALL, norm_style="gemma" if gemma else "llama", activation="gelu_tanh" if gemma else "silu"
            )
            block = random_block(shape, dtype, bias=True, head_norms=gemma, out_norms=gemma)
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
    shape = replace(SMALL, hidden=512, heads=8, kv_heads=2, head_dim=64, inner=1024, scale=0.125)
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
        duplicate.weights.q.weight.zero_()
        assert not torch.equal(duplicate(**arguments), expected)
        assert torch.equal(block(**arguments), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"up": Projection(torch.randn(100, 72).half())}, "up.weight has dtype torch.float16"),
        ({"down": Projection(torch.randn(100, 72).T)}, "down.weight has strides"),
        ({"o": Projection(torch.randn(72, 191))}, "o.weight has shape"),
        ({"q_norm": torch.randn(31)}, "q_norm has shape"),
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
