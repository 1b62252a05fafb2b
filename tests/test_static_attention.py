"""Attention over fixed buffers equals the textbook's, row by row, whatever lies in the columns that nobody sees."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_accel.ops import cached
from hf_accel.ops import static_attention as ops

CASES = list(
    itertools.product([(4, 4), (6, 2), (8, 1)], [1, 2, 5], [None, 7], [(None, False), (5.0, False), (None, True)])
)


def textbook(query: Any, keys: Any, values: Any, scale: float, window: Any, softcap: Any, sinks: Any) -> torch.Tensor:
    """Attention of one row whose T queries are its last columns, float64, a head and a query at a time."""
    heads, tokens, _ = query.shape
    length = keys.shape[1] - tokens
    result = torch.empty(heads, tokens, values.shape[2], dtype=torch.float64)
    for head, t in itertools.product(range(heads), range(tokens)):
        group = head // (heads // keys.shape[0])
        stop = length + t + 1
        first = 0 if window is None else max(0, stop - window)
        scores = scale * (keys[group, first:stop].double() @ query[head, t].double())
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
        result[head, t] = (weights / total) @ values[group, first:stop].double()
    return result


@pytest.mark.parametrize(("heads", "tokens", "window", "extra"), CASES, ids=lambda case: str(case).replace(" ", ""))
def test_equals_the_textbook_row_by_row(heads: Any, tokens: int, window: int | None, extra: Any) -> None:
    torch.manual_seed(0)
    (h, g), (softcap, has_sinks) = heads, extra
    lengths, starts, capacity = [0, 3, 17, 27 - tokens], [0, 2, 9, 0], 27
    query = torch.randn(4, h, tokens, 16)
    keys, values = torch.randn(4, g, capacity, 16), torch.randn(4, g, capacity, 8)
    sinks = torch.randn(h) if has_sinks else None
    found = ops.static_attention(
        query, keys, values, torch.tensor(lengths, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32),
        scale=0.3, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    assert found.shape == (4, h, tokens, 8)
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        k, v = (x[row, :, start : length + tokens] for x in (keys, values))
        right = textbook(query[row], k, v, 0.3, window, softcap, sinks)
        torch.testing.assert_close(found[row].double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_read_as_what_they_stand_for(bits: int) -> None:
    torch.manual_seed(1)
    query, keys, values = torch.randn(2, 4, 2, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 32)
    rows = cached.encode(keys, bits, is_key=True), cached.encode(values, bits, is_key=False)
    lengths, starts = torch.tensor([4, 10], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    found = ops.static_attention(query, *rows, lengths, starts, scale=0.25, bits=bits, head_dims=(16, 32))
    decoded = (
        cached.decode(rows[0], bits, 16, torch.float32, is_key=True),
        cached.decode(rows[1], bits, 32, torch.float32, is_key=False),
    )
    assert torch.equal(found, ops.static_attention(query, *decoded, lengths, starts, scale=0.25))
    exact = ops.static_attention(query, keys, values, lengths, starts, scale=0.25)
    assert (found - exact).abs().mean() < (0.02 if bits == 8 else 0.2) * exact.abs().mean()


def test_columns_beyond_a_row_do_not_matter() -> None:
    torch.manual_seed(2)
    query, keys, values = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    lengths, starts = torch.tensor([5, 11], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    before = ops.static_attention(query, keys, values, lengths, starts, scale=0.4)
    for buffer in (keys, values):
        buffer[0, :, 8:] = 1e4
        buffer[0, :, :2] = -1e4
        buffer[1, :, 14:] = 1e4
    assert torch.equal(ops.static_attention(query, keys, values, lengths, starts, scale=0.4), before)
