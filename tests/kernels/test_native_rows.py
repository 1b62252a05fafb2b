"""Sequences in buffers of their own in one call of the native decoder layer: each comes out as it does alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_twin import changed, inputs, random_block
from test_native_block import SMALL, isa
from test_native_block_prompts import WIDE, packed
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock
from hf_accel.ops import cached

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
SINKS = torch.tensor([1.0, -2.0, 0.5, 3.0])
MQA = changed(SMALL, hidden=37, heads=8, kv_heads=1, head_dim=10, inner=23)
BLOCKS: dict[str, Any] = {
    "plain": lambda dtype: random_block(SMALL, dtype),
    "one group of odd heads, soft-capped": lambda dtype: random_block(changed(MQA, softcap=3.0), dtype, bias=True),
    "norms": lambda dtype: random_block(WIDE, dtype, head_norms=True, out_norms=True),
    "8 bits": lambda dtype: packed(random_block(WIDE, dtype), 8),
    "4 bits": lambda dtype: packed(random_block(WIDE, dtype, bias=True), 4),
    "sinks": lambda dtype: extended(random_block(WIDE, dtype), sinks=SINKS.to(dtype)),
    "slopes": lambda dtype: extended(random_block(WIDE, dtype), slopes=0.1 * SINKS),
}  # fmt: skip
# pasts and firsts of sequences around the pieces of 256 positions; they are taken in turn
PLACES = [(600, 0), (3, 0), (255, 17), (256, 256), (0, 0), (770, 515), (513, 1), (40, 40), (12, 5), (511, 0), (254, 3)]


def extended(block: NativeBlock, **more: Any) -> NativeBlock:
    return NativeBlock(block.shape, replace(block.weights, **more))


def buffer(shape: tuple[int, ...], past: int, first: int, style: int, like: Tensor) -> Tensor:
    """A buffer [G, C, D] that holds `like` at positions [first, past), bytes that read as NaN elsewhere and around it.

    style: 0: contiguous, 1: heads beside each other at each position, 2: with gaps.
    """
    heads, room, size = shape
    nothing = 255 if like.dtype is torch.uint8 else math.nan
    if style == 0:
        found = like.new_full((heads, room, size), nothing)
    elif style == 1:
        found = like.new_full((room, heads, size), nothing).transpose(0, 1)
    else:
        found = like.new_full((heads + 2, room + 2, size + 6), nothing)[1 : heads + 1, 1 : room + 1, 3 : size + 3]
    found[:, first:past] = like[:, first:past]
    return found


def table(pairs: list[tuple[Tensor, Tensor]], places: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(
        [[k.data_ptr(), v.data_ptr(), *k.stride()[:2], *v.stride()[:2], *place]
         for (k, v), place in zip(pairs, places, strict=True)]
    )  # fmt: skip


class Apart:
    """Sequences in buffers of their own, each of another room and layout."""

    def __init__(self, block: NativeBlock, count: int, tokens: int, bits: int | None = None) -> None:
        self.block, self.bits = block, bits
        self.places = [PLACES[i % len(PLACES)] for i in range(count)]
        longest = max(past for past, _ in self.places)
        self.given = inputs(block.shape, block.dtype, count, tokens, longest)
        states = [self.given.pop(name) for name in ("keys", "values")]
        if bits is not None:
            states = [cached.encode(found, bits, is_key=i == 0) for i, found in enumerate(states)]
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for b, (past, first) in enumerate(self.places):
            room = past + tokens + b % 4
            keys, values = (
                buffer((block.shape.kv_heads, room, of.shape[3]), past, first, (b + part) % 3, of[b])
                for part, of in enumerate(states)
            )
            self.pairs.append((keys, values))
        self.given["past"], self.given["first"] = longest, min(first for _, first in self.places)

    def call(self, **more: Any) -> Any:
        keys, values = self.pairs[0]
        given = self.given | {"keys": keys[None], "values": values[None], "bits": self.bits}
        return self.block(**(given | {"rows": table(self.pairs, self.places)} | more))

    def alone(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield the result of each sequence by itself, and its buffers after the call."""
        for b, ((keys, values), (past, first)) in enumerate(zip(self.pairs, self.places, strict=True)):
            part = {name: self.given[name][b : b + 1] for name in ("hidden", "cos", "sin")}
            copies = keys.clone()[None], values.clone()[None]
            found = self.block(**part, keys=copies[0], values=copies[1], past=past, first=first, bits=self.bits)
            yield found, *copies


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def check(block: NativeBlock, count: int, tokens: int, bits: int | None = None) -> None:
    apart = Apart(block, count, tokens, bits)
    expected = list(apart.alone())
    found = apart.call()
    for b, (own, *written) in enumerate(expected):
        assert own.isfinite().all()
        assert torch.equal(found[b : b + 1], own), (b, apart.places[b])
        for mine, theirs in zip(apart.pairs[b], written, strict=True):  # its positions are written, and no others
            assert same(mine, theirs[0])


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_row_is_bit_equal_to_that_row_alone(isa: str, kind: str, dtype: torch.dtype) -> None:
    block = BLOCKS[kind](dtype)
    for count, tokens in ((1, 1), (2, 1), (8, 1), (17, 1), (40, 1), (60, 1), (1, 5), (2, 3), (8, 4)):
        check(block, count, tokens)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_codes(isa: str, bits: int, dtype: torch.dtype) -> None:
    block = random_block(WIDE, dtype, head_norms=True)
    for count, tokens in ((1, 1), (3, 1), (9, 2), (40, 1)):
        check(block, count, tokens, bits)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_and_of_passes(threads: int) -> None:
    block = random_block(changed(SMALL, hidden=256, heads=6, kv_heads=3, head_dim=64, inner=480), torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count, tokens in ((2, 1), (11, 1), (33, 1), (128, 1), (150, 1), (3, 25), (5, 30)):
            check(block, count, tokens)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("part", ["half", "attention"])
def test_parts_of_layers(part: str) -> None:
    block = random_block(SMALL, torch.float32)
    weights = {"gate": None, "up": None, "down": None}
    weights |= {"mlp_norm": None} if part == "attention" else {}
    block = NativeBlock(replace(block.shape, part=part), replace(block.weights, **weights))
    for count in (3, 35):
        apart = Apart(block, count, 1)
        expected = [own for own, *_ in apart.alone()]
        found = apart.call()
        if part == "attention":
            assert torch.equal(found, torch.cat(expected))
        else:
            assert all(torch.equal(one, torch.cat(other)) for one, other in zip(found, zip(*expected), strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_one_buffer_by_rows_is_the_plain_call(count: int) -> None:
    block = random_block(WIDE, torch.bfloat16)
    plain = inputs(WIDE, torch.bfloat16, count, 2, 300)
    by_rows = {name: value.clone() if isinstance(value, Tensor) else value for name, value in plain.items()}
    pairs = list(zip(by_rows["keys"], by_rows["values"], strict=True))
    assert torch.equal(block(**by_rows, rows=table(pairs, [(300, 0)] * count)), block(**plain))
    assert torch.equal(by_rows["keys"], plain["keys"])


@pytest.mark.parametrize("count", [2, 40])
def test_scores_that_are_not_finite_end_the_call(count: int) -> None:
    apart = Apart(random_block(SMALL, torch.float32), count, 1)
    assert apart.call().isfinite().all()
    apart.pairs[1][0][:, 1] = math.nan
    assert apart.call() is None


WRONG: list[tuple[int, int]] = [(6, 601), (7, 4), (6, -1), (0, 0), (1, 0)]


@pytest.mark.parametrize("field, value", WRONG)
def test_rows_out_of_range_are_refused(field: int, value: int) -> None:
    apart = Apart(random_block(SMALL, torch.float32), 2, 1)
    rows = table(apart.pairs, apart.places)
    rows[1, field] = value
    with pytest.raises(ValueError, match=r"buffers by row, past and first: .* no mask"):
        apart.call(rows=rows)
    with pytest.raises(ValueError, match=r"buffers by row"):
        apart.call(mask=torch.ones(1, 1, 1, 601, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"buffers by row"):
        apart.call(row_past=torch.tensor([600, 3]))


OTHERS = [lambda t: t[:1], lambda t: t.int(), lambda t: t[:, :7], lambda t: t.T.contiguous().T]


@pytest.mark.parametrize("change", OTHERS)
def test_tables_of_another_kind_are_refused(change: Any) -> None:
    apart = Apart(random_block(SMALL, torch.float32), 2, 1)
    with pytest.raises(ValueError, match=r"rows must be contiguous int64 \[2, 8\]"):
        apart.call(rows=change(table(apart.pairs, apart.places)))
