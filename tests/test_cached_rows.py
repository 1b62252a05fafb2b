"""Rows of codes against textbook twins in plain loops: what is stored, what it reads as, and how near that is."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_accel.ops import cached

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [(8, True), (8, False), (4, True), (4, False)]


def single(x: float) -> float:
    """Round to fp32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]  # type: ignore[no-any-return]


def neighbours(x: float) -> tuple[float, float]:
    """Return the greatest bf16 number that is not above x, and the least that is not below."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    inner = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    if inner == x:
        return x, x
    outer = struct.unpack("<f", struct.pack("<I", (bits & 0xFFFF0000) + 0x10000))[0]
    return (inner, outer) if x > 0 else (outer, inner)


def bytes_of(x: float) -> list[int]:
    return list(struct.pack("<f", x)[2:])


def hadamard(size: int) -> Tensor:
    """Sylvester's matrices in blocks of the largest power of two that divides the size, fp64."""
    block = 1
    while size % (2 * block) == 0:
        block *= 2
    rows = [[(-1.0) ** (i & j).bit_count() / math.sqrt(block) for j in range(block)] for i in range(block)]
    return torch.block_diag(*[torch.tensor(rows, dtype=torch.float64)] * (size // block))


def row_8(values: list[float]) -> list[int]:
    scale = neighbours(single(max(abs(x) for x in values) / 127))[1]
    inverse = single(1 / scale) if scale > 0 else 0.0
    codes = [max(-127, min(127, round(single(x * inverse)))) for x in values]
    return [code % 256 for code in codes] + bytes_of(scale)


def row_4(values: list[float]) -> list[int]:
    low = neighbours(min(values))[0]
    scale = neighbours(single(single(max(values) - low) / 15))[1]
    inverse = single(1 / scale) if scale > 0 else 0.0
    codes = [max(0, min(15, round(single(single(x - low) * inverse)))) for x in values]
    half = len(values) // 2
    return [codes[j] + 16 * codes[half + j] for j in range(half)] + bytes_of(scale) + bytes_of(low)


def read(row: list[int], bits: int, size: int) -> list[float]:
    """Return what a row stands for, before keys are turned back."""

    def number(at: int) -> float:
        return struct.unpack("<f", bytes([0, 0, *row[at : at + 2]]))[0]  # type: ignore[no-any-return]

    if bits == 8:
        return [single((byte - 256 if byte > 127 else byte) * number(size)) for byte in row[:size]]
    codes = [byte % 16 for byte in row[: size // 2]] + [byte // 16 for byte in row[: size // 2]]
    return [single(single(code * number(size // 2)) + number(size // 2 + 2)) for code in codes]


def numbers(rows: Tensor, bits: int, size: int) -> Tensor:
    """Return the bf16 numbers behind the codes."""
    behind = rows[..., size if bits == 8 else size // 2 :]
    return torch.tensor(behind.tolist(), dtype=torch.uint8).view(torch.bfloat16).float()


def spread(size: int, dtype: torch.dtype, tokens: int = 12) -> Tensor:
    """States [2, 3, tokens, size] of very different sizes: by row from 2^-12 to 2^12, all of one sign in some."""
    states = torch.randn(2, 3, tokens, size) * torch.exp2(torch.randint(-12, 12, (2, 3, tokens, 1)).float())
    states[0, 0] = states[0, 0].abs()
    states[1, 2] = -states[1, 2].abs()
    return states.to(dtype)


def snr(states: Tensor, bits: int, is_key: bool) -> float:
    rows = cached.encode(states, bits, is_key=is_key)
    found = cached.decode(rows, bits, states.shape[-1], torch.float32, is_key=is_key)
    return (10 * torch.log10(states.square().sum() / (found - states).square().sum())).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, is_key", [(8, True), (8, False), (4, False)])
@pytest.mark.parametrize("size", [2, 10, 32, 64])
def test_rows_are_the_textbooks(size: int, bits: int, is_key: bool, dtype: torch.dtype) -> None:
    states = spread(size, dtype)
    rows = cached.encode(states, bits, is_key=is_key)
    assert rows.dtype is torch.uint8
    assert rows.shape == (2, 3, 12, cached.row_bytes(bits, size))
    twin = {8: row_8, 4: row_4}[bits]
    decoded = cached.decode(rows, bits, size, dtype, is_key=is_key)
    for values, row, found in zip(*(x.flatten(0, 2) for x in (states.float(), rows, decoded)), strict=True):
        assert row.tolist() == twin(values.tolist())
        assert torch.equal(found, torch.tensor(read(row.tolist(), bits, size)).to(dtype))


@pytest.mark.parametrize("size", [2, 6, 32, 48, 64])
def test_rows_of_keys_in_4_bits_are_those_of_turned_keys(size: int) -> None:
    states = spread(size, torch.float32)
    rows = cached.encode(states, 4, is_key=True)
    assert torch.equal(rows, cached.encode(cached.rotate(states), 4, is_key=False))
    turned = cached.decode(rows, 4, size, torch.float32, is_key=False).double()
    found = cached.decode(rows, 4, size, torch.float32, is_key=True)
    expected = turned @ hadamard(size).T
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@given(st.integers(1, 96))
def test_turning_is_a_hadamard_matrix(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)
    states = torch.randn(3, 2, size)
    turned = cached.rotate(states)
    expected = states.double() @ matrix
    assert (turned - expected).abs().max() <= 1e-6 * states.norm()
    assert (cached.rotate(turned) - states).abs().max() <= 1e-6 * states.norm()
    assert torch.equal(cached.rotate(states[:, :1]), turned[:, :1])


def test_scores_do_not_change_when_queries_turn_too() -> None:
    queries, keys = torch.randn(5, 80).double(), torch.randn(7, 80).double()
    turned = cached.rotate(queries) @ cached.rotate(keys).T
    assert torch.allclose(turned, queries @ keys.T, atol=1e-6)


@pytest.mark.parametrize("bits, is_key", KINDS)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=24))
def test_no_value_is_further_away_than_half_a_step(bits: int, is_key: bool, values: list[float]) -> None:
    size = len(values) // 2 * 2
    states = torch.tensor(values[:size])
    rows = cached.encode(states, bits, is_key=is_key)
    found = cached.decode(rows, bits, size, torch.float32, is_key=False).double()
    if bits == 4 and is_key:
        states = cached.rotate(states)
    most, steps = states.double().abs().max(), 127 if bits == 8 else 15
    width = most if bits == 8 else states.double().max() - states.double().min() + most / 128  # the minimum moves down
    scale = numbers(rows, bits, size)[0].double()
    assert scale <= 1.01 * width / steps + 1e-38
    # a scale that has no inverse reads as zeros
    assert (found - states).abs().max() <= (0.501 * scale + 1e-6 * most if scale > 1e-37 else 127e-37)


@pytest.mark.parametrize("bits, is_key", KINDS)
def test_scales_are_rounded_up_and_minima_down(bits: int, is_key: bool) -> None:
    states = spread(64, torch.float32, 100)
    values = cached.rotate(states) if bits == 4 and is_key else states
    rows = cached.encode(states, bits, is_key=is_key)
    ends = numbers(rows, bits, 64)
    if bits == 8:
        assert (ends * 127 >= values.abs().amax(-1, keepdim=True) * (1 - 1e-6)).all()
        assert (ends * 127 <= values.abs().amax(-1, keepdim=True) * (1 + 2**-7)).all()
    else:
        scale, low = ends.chunk(2, dim=-1)
        assert (low <= values.amin(-1, keepdim=True)).all()
        assert (low >= values.amin(-1, keepdim=True) - values.abs().amax(-1, keepdim=True) / 128).all()
        assert (low + 15 * scale >= values.amax(-1, keepdim=True) * (1 - 1e-6)).all()


def test_how_near_rows_are() -> None:
    """dB; 3 bits more would be 18. Keys have a few large channels, which cost all others without a rotation."""
    states = torch.randn(4, 2000, 64)
    assert snr(states, 8, True) == snr(states, 8, False)
    assert 43 < snr(states, 8, True) < 46
    assert 19.5 < snr(states, 4, False) < 22
    assert abs(snr(states, 4, True) - snr(states, 4, False)) < 0.2
    keys = states.clone()
    keys[..., [3, 17]] += torch.tensor([25.0, -18.0])
    small = [channel for channel in range(64) if channel not in (3, 17)]
    errors = {}
    for is_key in (True, False):
        found = cached.decode(cached.encode(keys, 4, is_key=is_key), 4, 64, torch.float32, is_key=is_key)
        errors[is_key] = (found - keys)[..., small].square().mean() / keys[..., small].square().mean()
    assert errors[True] < 0.1
    assert errors[False] > 4 * errors[True]
    assert snr(keys, 4, True) > snr(keys, 4, False) + 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, is_key", KINDS)
def test_zero_rows_read_as_zero(bits: int, is_key: bool, dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, 3, 8, dtype=dtype)
    rows = cached.encode(zeros, bits, is_key=is_key)
    assert not rows.any()
    for given_rows in (rows, cached.encode(-zeros, bits, is_key=is_key)):
        assert not cached.decode(given_rows, bits, 8, dtype, is_key=is_key).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, is_key", KINDS)
def test_what_is_not_finite_reads_as_nan(bits: int, is_key: bool, dtype: torch.dtype) -> None:
    states = torch.randn(1, 1, 8, 32).to(dtype)
    for row, strange in enumerate((math.nan, math.inf, -math.inf)):
        states[0, 0, row, 5 * row] = strange
    states[0, 0, 3, 4], states[0, 0, 3, 9] = math.inf, -math.inf
    found = cached.decode(cached.encode(states, bits, is_key=is_key), bits, 32, dtype, is_key=is_key)
    assert found[0, 0, :4].isnan().all()
    clean = cached.decode(cached.encode(states[:, :, 4:], bits, is_key=is_key), bits, 32, dtype, is_key=is_key)
    assert clean.isfinite().all()
    assert torch.equal(found[:, :, 4:], clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, is_key", KINDS)
def test_the_largest_and_least_numbers(bits: int, is_key: bool, dtype: torch.dtype) -> None:
    """Numbers so small that their scale has no inverse read as zero, and never as anything larger than they are."""
    least = torch.full((1, 4), torch.finfo(dtype).tiny).to(dtype) / 4
    found = cached.decode(cached.encode(least, bits, is_key=is_key), bits, 4, torch.float32, is_key=is_key)
    assert found.abs().max() <= 2 * least.float().abs().max()
    largest = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * torch.finfo(dtype).max / 4
    found = cached.decode(cached.encode(largest.to(dtype), bits, is_key=is_key), bits, 4, torch.float32, is_key=is_key)
    assert (found - largest.to(dtype)).abs().max() <= 0.06 * torch.finfo(dtype).max / 4


@pytest.mark.parametrize("size", [1, 3, 7, 11, 33, 255])
def test_odd_sizes_of_8_bits(size: int) -> None:
    for shape in ((2, 3, 5, size), (1, 1, 1, size), (size,)):
        states = torch.randn(shape)
        rows = cached.encode(states, 8, is_key=True)
        assert rows.shape[-1] == size + 2
        found = cached.decode(rows, 8, size, torch.float32, is_key=True)
        assert (found - states).abs().max() <= states.abs().max() / 250


@pytest.mark.parametrize("bits, size", [(8, 11), (8, 64), (4, 10), (4, 64)])
def test_rows_may_begin_at_any_byte(bits: int, size: int) -> None:
    """A single token of a single head is contiguous wherever it lies: its scale may be at an odd address."""
    states = torch.randn(1, 1, 6, size)
    rows = cached.encode(states, bits, is_key=True)
    together = cached.decode(rows, bits, size, torch.float32, is_key=True)
    memory = torch.empty(rows.numel() + 1, dtype=torch.uint8)[1:].view(rows.shape).copy_(rows)
    for t in range(6):
        for kept in (rows, memory):
            found = cached.decode(kept[:, :, t : t + 1], bits, size, torch.float32, is_key=True)
            assert torch.equal(found, together[:, :, t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, is_key", KINDS)
def test_tokens_one_by_one_give_the_rows_of_all_at_once(bits: int, is_key: bool, dtype: torch.dtype) -> None:
    states = spread(48, dtype)
    rows = cached.encode(states, bits, is_key=is_key)
    for b in range(2):
        for t in range(12):
            one = cached.encode(states[b : b + 1, :, t : t + 1], bits, is_key=is_key)
            assert torch.equal(one, rows[b : b + 1, :, t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_key", [True, False])
def test_decoded_rows_of_4_bits_have_the_same_codes_again(is_key: bool, dtype: torch.dtype) -> None:
    """All bytes again for values in fp32; in 16 bits, or turned, the ends are rounded once more."""
    states = torch.randn(2, 3, 300, 64).to(dtype)
    rows = cached.encode(states, 4, is_key=is_key)
    again = cached.encode(cached.decode(rows, 4, 64, dtype, is_key=is_key), 4, is_key=is_key)
    assert torch.equal(again[..., :32], rows[..., :32])
    if dtype is torch.float32 and not is_key:
        assert torch.equal(again, rows)


def test_decoded_rows_of_8_bits_are_the_same_again_where_the_scale_was_exact() -> None:
    """Where rounding the scale up sent the largest value to 126 there is a finer scale for what is left."""
    states = torch.randn(2000, 64)
    rows = cached.encode(states, 8, is_key=True)
    again = cached.encode(cached.decode(rows, 8, 64, torch.float32, is_key=True), 8, is_key=True)
    full = rows[:, :64].view(torch.int8).abs().amax(-1) == 127
    assert 0.5 < full.float().mean() < 1.0
    assert torch.equal(again[full], rows[full])
    assert not torch.equal(again[~full], rows[~full])


def test_bytes_of_a_token() -> None:
    assert [cached.row_bytes(bits, 64) for bits in cached.BITS] == [66, 36]
    assert cached.row_bytes(8, 64) / 128 <= 0.53
    assert cached.row_bytes(4, 64) / 128 <= 0.29
