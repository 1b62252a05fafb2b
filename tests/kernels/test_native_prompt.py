"""Native attention of prompts against attention in fp64: a generated table of shapes, masks, dtypes and codes."""

from __future__ import annotations

import math
import random
from dataclasses import astuple
from typing import Any

import pytest
import torch
from block_twin import difference
from test_native_block import isa
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.ops import cached
from hf_accel.ops.attention import AttentionState

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# fp32: the order of sums. fp16: the result is rounded. bf16: weights are, too, where the machine multiplies bf16
TOLERANCES = {torch.float32: 3e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 255, 257)
HEAD_SIZES = (2, 16, 24, 40, 64, 80, 96, 128, 192, 256, 9)


class Case:
    """Queries, and keys and values as they are kept (`rows`) and as they read, in fp64."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, bits: int | None = None, seed: int = 0) -> None:
        batch, heads, groups, tokens, positions, *dims = sizes
        made = torch.Generator().manual_seed(seed)
        self.sizes, self.dims, self.bits, self.scale = sizes, (dims[0], dims[1]), bits, 1.5 / math.sqrt(dims[0])
        self.query = torch.randn(batch, heads, tokens, dims[0], generator=made).to(dtype)
        self.rows = [torch.randn(batch, groups, positions, d, generator=made).to(dtype) * 2 for d in dims]
        self.read = [x.double() for x in self.rows]
        if bits is not None:
            self.rows = [cached.encode(x, bits, is_key=i == 0) for i, x in enumerate(self.rows)]
            pairs = enumerate(zip(self.rows, dims, strict=True))
            self.read = [cached.decode(x, bits, d, torch.float32, is_key=i == 0).double() for i, (x, d) in pairs]

    def attention(self, **options: Any) -> Tensor:
        options = {"scale": self.scale, "bits": self.bits} | options
        return native.prompt_attention(self.query, *self.rows, self.dims, **options)

    def expected(
        self,
        scale: float | None = None,
        softcap: float | None = None,
        is_causal: bool = True,
        window: int | None = None,
        starts: Tensor | None = None,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        batch, heads, groups, tokens, positions, *_ = self.sizes
        keys, values = (x.repeat_interleave(heads // groups, 1) for x in self.read)
        scores = self.query.double() @ keys.mT * (self.scale if scale is None else scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        columns, own = torch.arange(positions), torch.arange(positions - tokens, positions)[:, None]
        visible = torch.ones(batch, heads, tokens, positions, dtype=torch.bool)
        if is_causal:
            visible &= columns <= own
        if window is not None:
            visible &= columns > own - window
        if starts is not None:
            visible &= columns >= starts[:, None, None, None]
        if mask is not None:
            visible &= mask
        scores = scores.masked_fill(~visible, -math.inf)
        extra = torch.zeros(heads) - math.inf if sinks is None else sinks
        weights = torch.cat([scores, extra.double().view(1, -1, 1, 1).expand(batch, -1, tokens, 1)], -1).softmax(-1)
        return (weights[..., :-1].nan_to_num(0.0) @ values).transpose(1, 2)

    def check(self, times: float = 1.0, **options: Any) -> None:
        found = self.attention(**options)
        assert found.dtype is self.query.dtype
        assert found.is_contiguous()
        assert difference(found, self.expected(**options)) < TOLERANCES[found.dtype] * times


def drawn(count: int, seed: int) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Shapes and what else a call may ask for, most of it at edges of vectors, tiles and spans."""
    made, rows = random.Random(seed), []
    for row in range(count):
        groups, ratio, tokens = made.choice((1, 2, 3)), made.choice((1, 2, 3, 7)), made.choice(EDGES)
        past = made.choice((0, 1, 30, 64, 130, 1030 if row % 5 == 0 else 5))
        batch, positions = made.choice((1, 2)), tokens + past
        sizes = (batch, groups * ratio, groups, tokens, positions, made.choice(HEAD_SIZES), made.choice(HEAD_SIZES))
        options: dict[str, Any] = {"is_causal": made.random() < 0.8}
        if made.random() < 0.3:
            options["softcap"] = made.choice((1.0, 5.0))
        if made.random() < 0.3:
            options["window"] = made.choice((1, 7, 32, 100))
        if made.random() < 0.4:
            options["starts"] = torch.tensor([made.randrange(positions) for _ in range(batch)])
        if made.random() < 0.3:
            generator = torch.Generator().manual_seed(row)
            shape = (made.choice((1, batch)), made.choice((1, groups * ratio)), tokens, positions)
            options["mask"] = torch.rand(shape, generator=generator) < made.choice((0.02, 0.6, 0.999))
        if made.random() < 0.3:
            options["sinks"] = torch.tensor([made.uniform(-3.0, 6.0) for _ in range(groups * ratio)])
        rows.append((sizes, options))
    return rows


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_equals_attention_in_fp64(isa: str, dtype: torch.dtype) -> None:
    for seed, (sizes, options) in enumerate(drawn(25, 1)):
        Case(sizes, dtype, seed=seed).check(**options)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_equals_attention_over_what_the_rows_read_as(isa: str, bits: int, dtype: torch.dtype) -> None:
    for seed, (sizes, options) in enumerate(drawn(8, 2)):
        even = (*sizes[:5], *(d + d % 2 for d in sizes[5:]))
        Case(even, dtype, bits, seed).check(3.0, **options)  # what is read is rounded to the dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_stretches_and_spans_end(isa: str, dtype: torch.dtype) -> None:
    for tokens, positions in ((3, 1023), (40, 1024), (2, 1025), (33, 1151), (70, 2049)):
        Case((1, 2, 1, tokens, positions, 64, 32), dtype).check()
        Case((1, 2, 1, tokens, positions, 32, 64), dtype).check(window=1000, starts=torch.tensor([1010]))


def test_more_queries_than_positions() -> None:
    """The first see nothing, and are given zeros."""
    case = Case((1, 2, 1, 40, 30, 32, 32), torch.float32)
    case.check()
    case.check(sinks=torch.zeros(2))
    assert not case.attention()[:, :10].any()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    for dtype in native.DTYPES:
        for softcap in (None, 4.0):
            Case((1, 2, 1, 40, 70, 32, 32), dtype).check(scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_query_comes_out_as_it_does_alone(isa: str, bits: int | None, dtype: torch.dtype) -> None:
    """To the last bit, whatever rows, heads, tokens and columns that it does not see are with it."""
    case = Case((2, 6, 2, 150, 290, 64, 40), dtype, bits)
    starts = torch.tensor([37, 0])
    together = case.attention(starts=starts)
    for b, h, t in ((0, 0, 0), (0, 4, 149), (1, 2, 77), (1, 5, 31)):
        query = case.query[b : b + 1, h : h + 1, t : t + 1]
        keys, values = (x[b : b + 1, h // 3 : h // 3 + 1, : 141 + t] for x in case.rows)
        own = starts[b : b + 1]
        alone = native.prompt_attention(query, keys, values, case.dims, scale=case.scale, starts=own, bits=bits)
        assert torch.equal(alone[0, 0, 0], together[b, t, h])


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_any_number_of_threads_and_strides(bits: int | None) -> None:
    case = Case((2, 6, 2, 300, 430, 64, 64), torch.bfloat16, bits)
    options = {"starts": torch.tensor([0, 90]), "window": 250}
    expected, before = case.attention(**options), torch.get_num_threads()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(case.attention(**options), expected)
    finally:
        torch.set_num_threads(before)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    case.rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.rows]
    assert torch.equal(case.attention(**options), expected)
    case.rows = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in case.rows]
    assert torch.equal(case.attention(**options), expected)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_mask_in_another_form_gives_the_same(isa: str, bits: int | None) -> None:
    case = Case((2, 4, 2, 90, 200, 32, 32), torch.float32, bits)
    starts = torch.tensor([50, 3])
    columns, own = torch.arange(200), torch.arange(110, 200)[:, None]
    mask = ((columns <= own) & (columns > own - 77) & (columns >= starts[:, None, None]))[:, None]
    expected = case.attention(starts=starts, window=77)
    for form in (mask, mask.expand(-1, 4, -1, -1), mask.expand(-1, 4, -1, -1).contiguous()):
        assert torch.equal(case.attention(mask=form, is_causal=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_visible_to_those_who_see_it(isa: str, dtype: torch.dtype) -> None:
    for place in (0, 1):
        case = Case((2, 4, 2, 90, 290, 64, 64), dtype)
        case.rows[place][1, 0, 260, 7] = math.nan  # query 60 stands there
        strange = case.attention().isnan().any(-1)
        assert strange[1, 60:, :2].all()
        assert not strange[0].any()
        assert not strange[1, :, 2:].any()
        assert not strange[1, :20].any()
    case = Case((1, 4, 2, 40, 90, 64, 64), dtype)
    case.query[0, 1, 7, 3] = math.nan
    strange = case.attention().isnan().all(-1)
    assert strange[0, 7, 1]
    assert strange.sum() == 1


def test_scores_that_are_far_apart(isa: str) -> None:
    """Of queries that are large, all but one weight are nothing; and what is not visible may be the largest by far."""
    for dtype in native.DTYPES:
        case = Case((1, 1, 1, 300, 300, 64, 64), dtype)
        case.query *= 100
        case.check(10.0)
        case.rows[0][:, :, 200:] *= 50
        case.read[0][:, :, 200:] *= 50
        found, expected = case.attention()[:, :200], case.expected()[:, :200]
        assert difference(found, expected) < TOLERANCES[dtype] * 10.0


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_parts_merge_into_the_whole(isa: str, bits: int | None) -> None:
    case = Case((2, 4, 2, 90, 300, 64, 32), torch.float32, bits)
    for is_causal in (True, False):
        for cuts in ((100,), (32, 220, 299), (1,)):
            state: AttentionState | None = None
            for first, stop in zip((0, *cuts), (*cuts, 300), strict=True):
                keys, values = (x[:, :, first:stop] for x in case.rows)
                part = native.prompt_state(
                    case.query,
                    keys,
                    values,
                    case.dims,
                    past=210 - first,
                    scale=case.scale,
                    is_causal=is_causal,
                    bits=bits,
                )
                assert all(x.dtype is torch.float32 for x in astuple(part))
                state = part if state is None else state.merge(part)
            assert state is not None
            assert difference(state.result(torch.float32).transpose(1, 2), case.expected(is_causal=is_causal)) < 3e-6


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "change",
    [
        lambda case: {"keys": case.rows[0].to(torch.float16)},
        lambda case: {"values": case.rows[1].to(torch.float16)},
        lambda case: {"query": case.query.double()},
        lambda case: {"query": case.query[:1]},
        lambda case: {"query": case.query[:, :3]},
        lambda case: {"query": case.query.mT.contiguous().mT},
        lambda case: {"values": case.rows[1][:, :, :8]},
        lambda case: {"keys": case.rows[0][..., :-1]},
        lambda case: {"keys": case.rows[0][:, :, :0], "values": case.rows[1][:, :, :0]},
        lambda case: {"head_dims": (16, 18)},
        lambda case: {"window": 0},
        lambda case: {"starts": torch.tensor([0])},
        lambda case: {"starts": torch.tensor([0, 1], dtype=torch.int32)},
        lambda case: {"sinks": torch.zeros(4, dtype=torch.float64)},
        lambda case: {"sinks": torch.zeros(2)},
        lambda case: {"mask": torch.ones(2, 1, 3, 9)},
        lambda case: {"mask": torch.ones(3, 1, 3, 9, dtype=torch.bool)},
        lambda case: {"mask": torch.ones(1, 1, 3, 8, dtype=torch.bool)},
        lambda case: {"mask": torch.ones(1, 1, 9, 3, dtype=torch.bool).mT},
    ],
)
def test_what_does_not_fit_is_refused(bits: int | None, change: Any) -> None:
    case = Case((2, 4, 2, 3, 9, 16, 16), torch.float32, bits)
    arguments = {"query": case.query, "keys": case.rows[0], "values": case.rows[1], "head_dims": case.dims}
    native.prompt_attention(**arguments, scale=1.0, bits=bits)
    with pytest.raises(ValueError):
        native.prompt_attention(**(arguments | change(case)), scale=1.0, bits=bits)


def test_heads_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 256"):
        Case((1, 1, 1, 2, 3, 288, 32), torch.float32).attention()
