"""Native attention over parts of a cache, as it is or in rows of codes, against attention in fp64; writing of rows."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import pytest
import torch
from block_twin import difference
from hypothesis import given
from hypothesis import strategies as st
from test_native_block import isa
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.ops import cached
from hf_accel.ops.attention import AttentionState

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
FORMATS = [None, 8, 4]
# the order of sums in fp32, over turned keys and with minima in 4 bits; what rounding the queries costs is in the twin
TOLERANCES = {None: 2e-6, 8: 2e-6, 4: 2e-5}
# B, H, G, T, n, D of keys, D of values
CASES = [
    (1, 1, 1, 1, 1, 32, 32),
    (2, 4, 4, 1, 300, 64, 64),  # one query a head
    (2, 6, 2, 3, 257, 48, 80),
    (1, 8, 1, 1, 700, 128, 36),
    (1, 8, 1, 5, 255, 32, 64),  # 40 queries over the same keys
    (3, 4, 2, 16, 33, 20, 10),
    (1, 3, 1, 7, 1030, 256, 128),
    (2, 2, 2, 4, 512, 8, 256),
    (1, 4, 2, 2, 259, 96, 2),
]


class Case:
    """Queries, and keys and values as they are kept (`rows`) and as they read, in fp64."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, bits: int | None, seed: int = 0) -> None:
        batch, heads, groups, tokens, positions, *dims = sizes
        generator = torch.Generator().manual_seed(seed)
        self.dims, self.bits, self.scale = (dims[0], dims[1]), bits, 1.5 / math.sqrt(dims[0])
        self.query = torch.randn(batch, heads, tokens, dims[0], generator=generator).to(dtype)
        made = [torch.randn(batch, groups, positions, d, generator=generator) * 2 for d in dims]
        made[0][..., 0] += 5.0
        made[1] *= torch.exp2(torch.randint(-3, 4, made[1].shape[:3], generator=generator))[..., None]
        self.rows = [x.to(dtype) for x in made]
        if bits is not None:
            self.rows = [cached.encode(x, bits, is_key=i == 0) for i, x in enumerate(self.rows)]

    def attend(self, first: int = 0, stop: int | None = None, mask: Tensor | None = None, **more: Any) -> Any:
        """Over positions [first, stop), whose mask is cut out of `mask`."""
        keys, values = (x[:, :, first:stop] for x in self.rows)
        mask = None if mask is None else mask[..., first:stop]
        return native.attend(self.query, keys, values, self.dims, scale=self.scale, mask=mask, bits=self.bits, **more)

    def expected(self, mask: Tensor | None = None, softcap: float | None = None) -> Tensor:
        query, keys, values = self.query.double(), self.rows[0].double(), self.rows[1].double()
        if self.bits is not None:
            # queries meet codes in integers, over keys that are still turned
            turned = self.query.float() if self.bits == 8 else cached.rotate(self.query.float())
            step = turned.abs().amax(-1, keepdim=True) / (32767.0 if self.bits == 8 else 127.0)
            query = (turned * (1.0 / step)).round().double() * step.double()
            keys = cached.decode(self.rows[0], self.bits, self.dims[0], torch.float32, is_key=False).double()
            values = cached.decode(self.rows[1], self.bits, self.dims[1], torch.float32, is_key=False).double()
        ratio = query.shape[1] // keys.shape[1]
        scores = query @ keys.repeat_interleave(ratio, 1).mT * self.scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ values.repeat_interleave(ratio, 1)

    def check(self, mask: Tensor | None = None, softcap: float | None = None) -> None:
        found = self.attend(mask=mask, softcap=softcap).result(torch.float32)
        assert difference(found, self.expected(mask, softcap)) < TOLERANCES[self.bits]


def bit_equal(one: AttentionState, other: AttentionState) -> bool:
    return all(torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in zip(astuple(one), astuple(other)))


def copied(state: AttentionState) -> AttentionState:
    return AttentionState(*(x.clone() for x in astuple(state)))


def masks(sizes: tuple[int, ...]) -> list[Tensor]:
    """Random ones for all, by row and by head, the last with queries that see nothing, and a causal one."""
    batch, heads, _, tokens, positions, *_ = sizes
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, 1), (batch, 1), (1, heads), (batch, heads)]
    made = [torch.rand(*shape, tokens, positions, generator=generator) < 0.6 for shape in shapes]
    made[3][0, 0, 0] = made[3][-1, -1] = False
    return [*made, torch.ones(1, 1, tokens, positions, dtype=torch.bool).tril(positions - tokens)]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_equals_attention_over_what_the_rows_read_as(isa: str, bits: int | None, dtype: torch.dtype) -> None:
    for sizes in CASES:
        case = Case(sizes, dtype, bits)
        case.check()
        case.check(softcap=3.0)
        for mask in masks(sizes):
            case.check(mask)


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize("bits", FORMATS)
def test_any_number_of_queries(bits: int | None, tokens: int) -> None:
    for heads, groups in ((2, 2), (3, 1), (4, 2), (7, 1)):
        sizes = (1, heads, groups, tokens, 70, 32, 32)
        Case(sizes, torch.float32, bits, tokens).check(masks(sizes)[4])


@pytest.mark.parametrize("bits", [8, 4])
def test_is_near_attention_before_the_queries_are_rounded(bits: int) -> None:
    case = Case((1, 4, 2, 2, 500, 64, 64), torch.float32, bits)
    keys, values = (cached.decode(x, bits, 64, torch.float32, is_key=i == 0) for i, x in enumerate(case.rows))
    plain = Case((1, 4, 2, 2, 500, 64, 64), torch.float32, None)
    plain.rows = [keys, values]
    limit = 3e-4 if bits == 8 else 3e-2
    assert difference(case.attend().result(torch.float32), plain.expected()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_parts_give_what_the_whole_gives(isa: str, bits: int | None, dtype: torch.dtype) -> None:
    """Within rounding for any parts, and to the last bit for parts that end where pieces of 256 positions do."""
    sizes = (2, 6, 2, 3, 1030, 64, 48)
    case = Case(sizes, dtype, bits)
    for mask in (None, *masks(sizes)):
        whole = case.attend(mask=mask)
        for cuts in ((1,), (5, 6, 7, 300), (255, 257, 1029), (256, 512, 768, 1024), (512,), (768, 1024)):
            state, before = None, 0
            for cut in (*cuts, sizes[4]):
                state, before = case.attend(before, cut, mask, state=state), cut
            assert isinstance(state, AttentionState)
            assert difference(state.result(torch.float32), whole.result(torch.float32)) < TOLERANCES[bits]
            if all(cut % 256 == 0 for cut in cuts):
                assert bit_equal(state, whole)


@given(st.data(), st.sampled_from(FORMATS))
def test_any_parts_in_any_order(data: st.DataObject, bits: int | None) -> None:
    sizes = (1, 4, 2, 2, 300, 16, 16)
    case = Case(sizes, torch.float32, bits)
    mask = masks(sizes)[3]
    cuts = sorted(data.draw(st.sets(st.integers(1, 299), max_size=6)))
    parts = data.draw(st.permutations(list(zip([0, *cuts], [*cuts, 300], strict=True))))
    state = None
    for first, stop in parts:
        state = case.attend(first, stop, mask, state=state)
    assert difference(state.result(torch.float32), case.expected(mask)) < TOLERANCES[bits]  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", FORMATS)
def test_parts_that_nobody_sees_change_nothing(isa: str, bits: int | None) -> None:
    sizes = (1, 2, 1, 2, 40, 32, 32)
    case = Case(sizes, torch.float32, bits)
    mask = torch.zeros(1, 1, 2, 40, dtype=torch.bool)
    nothing = case.attend(mask=mask)
    assert not nothing.values.any()
    assert nothing.top.isneginf().all()
    assert not nothing.sum.any()
    assert not nothing.result(torch.float32).any()
    seen = case.attend(10, 30)
    assert bit_equal(case.attend(10, 30, state=copied(nothing)), seen)
    assert bit_equal(case.attend(0, 10, mask, state=copied(seen)), seen)
    one = mask.clone()
    one[0, 0, 1, 35] = True  # a single query sees a single position
    found = case.attend(mask=one, state=copied(nothing)).result(torch.float32)
    assert not found[:, :, 0].any()
    assert difference(found, case.expected(one)) < TOLERANCES[bits]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_a_query_comes_out_as_it_does_alone(isa: str, bits: int | None, dtype: torch.dtype) -> None:
    """To the last bit, whatever rows, heads and tokens are with it."""
    sizes = (3, 6, 2, 5, 600, 64, 40)
    case, mask = Case(sizes, dtype, bits), masks(sizes)[3]
    together = case.attend(mask=mask)
    for b, h, t in ((0, 0, 0), (0, 3, 4), (1, 2, 1), (2, 5, 3), (2, 0, 4)):
        query, own = (x[b : b + 1, h : h + 1, t : t + 1] for x in (case.query, mask))
        keys, values = (x[b : b + 1, h // 3 : h // 3 + 1] for x in case.rows)
        alone = native.attend(query, keys, values, case.dims, scale=case.scale, mask=own, bits=bits)
        assert torch.equal(alone.values[0, 0, 0], together.values[b, h, t])
        assert (alone.top[0, 0, 0], alone.sum[0, 0, 0]) == (together.top[b, h, t], together.sum[b, h, t])


@pytest.mark.parametrize("bits", FORMATS)
def test_any_number_of_threads_and_strides(bits: int | None) -> None:
    sizes = (2, 8, 4, 2, 1500, 64, 64)
    case = Case(sizes, torch.bfloat16, bits)
    expected, before = case.attend(), torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert bit_equal(case.attend(), expected)
    finally:
        torch.set_num_threads(before)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    case.rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.rows]
    assert bit_equal(case.attend(), expected)


@pytest.mark.parametrize("bits", FORMATS)
def test_nan_stays_visible(isa: str, bits: int | None) -> None:
    """Of keys and values for the heads that read them, of queries for themselves."""
    for place in (0, 1):
        case = Case((2, 4, 2, 3, 290, 64, 64), torch.float32, None)
        case.rows[place][1, 0, 270, 7] = math.nan
        if bits is not None:
            case.rows = [cached.encode(x, bits, is_key=i == 0) for i, x in enumerate(case.rows)]
            case.bits = bits
        state = None
        for first, stop in ((0, 100), (100, 271), (271, 290)):
            state = case.attend(first, stop, state=state)
        for made in (case.attend(), state):
            strange = made.result(torch.float32).isnan()  # type: ignore[union-attr]
            assert strange[1, :2].any(-1).all()
            assert not strange[0].any()
            assert not strange[1, 2:].any()
    case = Case((1, 4, 2, 3, 290, 64, 64), torch.float32, bits)
    case.query[0, 1, 2, 3] = math.nan
    strange = case.attend().result(torch.float32).isnan().all(-1)
    assert strange[0, 1, 2]
    assert strange.sum() == 1


@pytest.mark.parametrize("bits", FORMATS)
def test_nan_stays_visible_where_later_scores_are_far_above(bits: int | None) -> None:
    """As in the other order, and in PyTorch: nothing times NaN is NaN."""
    keys, values = torch.zeros(1, 1, 600, 16), torch.randn(1, 1, 600, 16)
    keys[:, :, 400:], values[0, 0, 3, 2] = 40.0, math.nan
    case = Case((1, 1, 1, 1, 600, 16, 16), torch.float32, bits)
    case.query.fill_(4.0)
    case.rows = [keys, values] if bits is None else [cached.encode(x, bits, is_key=x is keys) for x in (keys, values)]
    assert case.attend().result(torch.float32).isnan().any()


GOOD: dict[str, Any] = {"sizes": (2, 4, 2, 3, 9, 16, 16), "dtype": torch.float32}


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(
    "change",
    [
        lambda case: {"keys": case.rows[0].to(torch.float16)},
        lambda case: {"values": case.rows[1].to(torch.float16)},
        lambda case: {"query": case.query.double()},
        lambda case: {"query": case.query[:1]},
        lambda case: {"query": case.query[:, :3]},
        lambda case: {"query": case.query.transpose(2, 3).contiguous().transpose(2, 3)},
        lambda case: {"values": case.rows[1][:, :, :8]},
        lambda case: {"keys": case.rows[0][..., :-1]},
        lambda case: {"values": case.rows[1][..., :-2]},
        lambda case: {"keys": case.rows[0][:, :, :0], "values": case.rows[1][:, :, :0]},
        lambda case: {"head_dims": (16, 18)},
        lambda case: {"head_dims": (17, 16)},
        lambda case: {"mask": torch.ones(2, 1, 3, 9)},
        lambda case: {"mask": torch.ones(3, 1, 3, 9, dtype=torch.bool)},
        lambda case: {"mask": torch.ones(1, 2, 3, 9, dtype=torch.bool)},
        lambda case: {"mask": torch.ones(1, 1, 1, 9, dtype=torch.bool)},
        lambda case: {"mask": torch.ones(1, 1, 3, 8, dtype=torch.bool)},
        lambda case: {"mask": torch.ones(1, 1, 9, 3, dtype=torch.bool).mT},
        lambda case: {"state": Case((2, 4, 2, 2, 9, 16, 16), torch.float32, None).attend()},
    ],
)
def test_what_does_not_fit_is_refused(bits: int | None, change: Any) -> None:
    case = Case(**GOOD, bits=bits)
    arguments = {"query": case.query, "keys": case.rows[0], "values": case.rows[1], "head_dims": case.dims}
    native.attend(**arguments, scale=1.0, bits=bits)
    with pytest.raises(ValueError):
        native.attend(**(arguments | change(case)), scale=1.0, bits=bits)


def test_heads_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="288"):
        Case((1, 1, 1, 1, 3, 288, 32), torch.float32, None).attend()
    with pytest.raises(ValueError, match="up to 256, not 288"):
        native.encode(torch.zeros(1, 1, 1, 288), 8, torch.zeros(1, 1, 1, 290, dtype=torch.uint8), is_key=True)


def same_rows(states: Tensor, bits: int, is_key: bool, found: Tensor) -> None:
    expected = cached.encode(states, bits, is_key=is_key)
    finite = states.isfinite().all(-1)
    assert torch.equal(found[finite], expected[finite])
    read = cached.decode(found, bits, states.shape[-1], torch.float32, is_key=is_key)
    assert read[~finite].isnan().all()


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_those_of_ops_to_the_last_bit(isa: str, bits: int, is_key: bool, dtype: torch.dtype) -> None:
    for size in range(2, 257, 1 if bits == 8 else 2):
        states = torch.randn(2, 3, 5, size) * torch.exp2(torch.randint(-10, 10, (2, 3, 5, 1)).float())
        states[0, 0, 0], states[0, 0, 1] = 0.0, -0.0
        states[0, 1, 2, 1], states[1, 2, 4, 0], states[1, 0, 0] = math.inf, math.nan, -math.inf
        states[0, 0, 2] = states[0, 0, 2].abs()
        states[1, 1, 1] = -7.0
        states[1, 1, 2] *= 1e-38
        states = states.to(dtype)
        rows = torch.empty(2, 3, 5, cached.row_bytes(bits, size), dtype=torch.uint8)
        native.encode(states, bits, rows, is_key=is_key)
        same_rows(states, bits, is_key, rows)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_read_and_written_where_strides_say(bits: int) -> None:
    size = 32
    wide = torch.randn(2, 9, 4, size + 6)
    states = wide.transpose(1, 2)[:, 1:3, 2:7, 3 : size + 3]  # [2, 2, 5, D]
    buffer = torch.full((2, 11, 2, cached.row_bytes(bits, size) + 3), 201, dtype=torch.uint8)
    rows = buffer.transpose(1, 2)[:, :, 4:9, 1:-2]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    native.encode(states, bits, rows, is_key=True)
    torch.set_num_threads(before)
    same_rows(states, bits, True, rows)
    rows.fill_(201)
    assert (buffer == 201).all(), "bytes beside the rows were written"


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_do_not_fit_are_refused(bits: int) -> None:
    states, rows = torch.randn(1, 2, 3, 8), torch.empty(1, 2, 3, cached.row_bytes(bits, 8), dtype=torch.uint8)
    for other_states, other in (
        (states.double(), rows),
        (torch.randn(1, 2, 8, 3).mT, rows),
        (states, rows[..., :-1]),
        (states, rows[:, :, :2]),
        (states, rows.to(torch.int16)),
        (states[:, :1], rows),
    ):
        with pytest.raises(ValueError):
            native.encode(other_states, bits, other, is_key=True)
    if bits == 4:
        with pytest.raises(ValueError):
            native.encode(torch.randn(1, 2, 3, 9), bits, rows, is_key=True)
