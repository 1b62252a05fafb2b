"""Scores and choices of cached positions against textbooks in loops, row by row, and against the same rows alone."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from hf_accel.cache.eviction import METHODS
from hf_accel.ops.eviction import (
    accumulate,
    attention_weights,
    h2o_scores,
    keep_positions,
    kept,
    key_norm_scores,
    snapkv_scores,
    tova_scores,
)

B, D, SCALE = 3, 5, 0.6
HEADS = [(1, 1), (2, 1), (4, 2), (6, 2), (6, 3), (4, 4)]
PADS = (0, 4, 9)


def case(heads: int, groups: int, tokens: int, positions: int = 14) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query, keys, valid and visible of rows padded on the left by PADS; the padding is wild, not zero."""
    generator = torch.Generator().manual_seed(heads * 100 + groups * 10 + tokens)
    query = torch.randn(B, heads, tokens, D, generator=generator) * 2
    keys = torch.randn(B, groups, positions, D, generator=generator) * 2
    place = torch.arange(positions)
    valid = place >= torch.tensor(PADS)[:, None]
    keys = torch.where(valid[:, None, :, None], keys, 50.0)
    causal = place <= torch.arange(positions - tokens, positions)[:, None]
    return query, keys, valid, causal & valid[:, None]


def weights_of(heads: int, groups: int, tokens: int, positions: int = 14) -> tuple[Tensor, Tensor]:
    query, keys, valid, visible = case(heads, groups, tokens, positions)
    return attention_weights(query, keys, SCALE, visible), valid


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=1e-5)


def textbook_attention(query: Tensor, keys: Tensor, scale: float, visible: Tensor) -> Tensor:
    """One query of one head at a time, in float64 and Python's own exponential."""
    heads, tokens, groups, positions = query.shape[1], query.shape[2], keys.shape[1], keys.shape[2]
    ratio = heads // groups
    found = torch.zeros(B, groups, ratio, tokens, positions, dtype=torch.float64)
    for b in range(B):
        for h in range(heads):
            for t in range(tokens):
                seen = [s for s in range(positions) if visible[b, t, s]]
                products = {s: scale * float(query[b, h, t].double() @ keys[b, h // ratio, s].double()) for s in seen}
                top = max(products.values(), default=0.0)
                total = sum(math.exp(value - top) for value in products.values())
                for s in seen:
                    found[b, h // ratio, h % ratio, t, s] = math.exp(products[s] - top) / total
    return found


@pytest.mark.parametrize("heads, groups", HEADS)
@pytest.mark.parametrize("tokens", [1, 3, 14])
def test_weights_equal_a_textbook(heads: int, groups: int, tokens: int) -> None:
    query, keys, _, visible = case(heads, groups, tokens)
    found = attention_weights(query, keys, SCALE, visible)
    assert found.dtype == torch.float32
    assert found.shape == (B, groups, heads // groups, tokens, 14)
    close(found, textbook_attention(query, keys, SCALE, visible))


def test_weights_sum_to_one_causally_and_to_zero_where_nothing_is_seen() -> None:
    query, keys, _, visible = case(4, 2, 14)
    found = attention_weights(query, keys, SCALE, visible)
    assert not bool(found.isnan().any())
    assert bool((found[~visible[:, None, None].expand_as(found)] == 0).all())
    sees = visible.any(-1)[:, None, None].expand(found.shape[:-1])
    assert not bool(sees.all()), "padded queries see nothing"
    close(found.sum(-1), sees.float())
    assert bool((found[0, 0, 0].triu(1) == 0).all())


def test_hidden_keys_have_no_influence_not_even_if_they_are_no_numbers() -> None:
    query, keys, valid, visible = case(4, 2, 3)
    expected = attention_weights(query, keys, SCALE, visible)
    for value in (math.inf, math.nan):
        wild = torch.where(valid[:, None, :, None], keys, value)
        assert torch.equal(attention_weights(query, wild, SCALE, visible), expected)


def test_weights_of_bfloat16_are_those_of_its_values_in_fp32() -> None:
    query, keys, _, visible = case(4, 2, 3)
    query, keys = query.bfloat16(), keys.bfloat16()
    found = attention_weights(query, keys, SCALE, visible)
    assert torch.equal(found, attention_weights(query.float(), keys.float(), SCALE, visible))
    assert found.dtype == torch.float32


def test_weights_leave_their_arguments_alone() -> None:
    query, keys, _, visible = case(4, 2, 3)
    before = [tensor.clone() for tensor in (query, keys, visible)]
    attention_weights(query, keys, SCALE, visible)
    assert all(torch.equal(one, other) for one, other in zip(before, (query, keys, visible)))


def textbook_snapkv(weights: Tensor, valid: Tensor, size: int, pooling: str) -> Tensor:
    """SnapKV: every sum and every pool in loops; what is outside of the valid prefix counts as zero."""
    _, groups, ratio, tokens, positions = weights.shape
    earlier = positions - tokens
    found = torch.zeros(B, groups, positions)
    for b in range(B):
        for g in range(groups):
            for s in range(positions):
                if not valid[b, s]:
                    continue
                if s >= earlier:
                    found[b, g, s] = math.inf
                    continue
                heads = []
                for r in range(ratio):
                    near = [n for n in range(s - size // 2, s + size // 2 + 1) if 0 <= n < earlier and valid[b, n]]
                    sums = [sum(float(weights[b, g, r, t, n]) for t in range(tokens)) for n in near]
                    heads.append(max(sums) if pooling == "max" else sum(sums) / size)
                found[b, g, s] = sum(heads) / ratio
    return found


@pytest.mark.parametrize("heads, groups", HEADS)
@pytest.mark.parametrize("tokens", [1, 3, 13, 14])
@pytest.mark.parametrize("size", [1, 5, 7, 31])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_snapkv_equals_a_textbook(heads: int, groups: int, tokens: int, size: int, pooling: str) -> None:
    weights, valid = weights_of(heads, groups, tokens)
    close(snapkv_scores(weights, valid, size, pooling), textbook_snapkv(weights, valid, size, pooling))  # type: ignore


def test_snapkv_excludes_padding_even_if_it_is_attended() -> None:
    weights, valid = weights_of(4, 2, 3)
    attended = torch.where(valid[:, None, None, None], weights, 9.0)
    for pooling in ("max", "mean"):
        assert torch.equal(
            snapkv_scores(attended, valid, 5, pooling),  # type: ignore[arg-type]
            snapkv_scores(weights, valid, 5, pooling),  # type: ignore[arg-type]
        )
    for score in (h2o_scores, tova_scores):
        assert torch.equal(score(attended, valid), score(weights, valid))


def test_snapkv_keeps_the_neighbours_of_what_is_attended_and_its_window() -> None:
    weights = torch.zeros(1, 1, 2, 2, 12)
    weights[0, 0, 1, :, 4] = 0.5
    weights[..., 10:] = 3.0
    scores = snapkv_scores(weights, torch.ones(1, 12, dtype=torch.bool), kernel_size=5)
    expected = torch.tensor([0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, math.inf, math.inf])
    assert torch.equal(scores[0, 0], expected), "the window's large weights do not spill over to 8 and 9"


@pytest.mark.parametrize("heads, groups", HEADS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_h2o_and_tova_equal_textbooks(heads: int, groups: int, tokens: int) -> None:
    weights, valid = weights_of(heads, groups, tokens)
    ratio = heads // groups
    sums, last = torch.zeros(B, groups, 14), torch.zeros(B, groups, 14)
    for b in range(B):
        for s in range(14):
            for g in range(groups):
                for r in range(ratio):
                    sums[b, g, s] += sum(float(weights[b, g, r, t, s]) for t in range(tokens)) / ratio
                    last[b, :, s] += float(weights[b, g, r, tokens - 1, s]) / heads
    close(h2o_scores(weights, valid), sums)
    found = tova_scores(weights, valid)
    close(found, last)
    assert bool((found == found[:, :1]).all())


@pytest.mark.parametrize("heads, groups", HEADS)
def test_h2o_accumulates_as_algorithm_1(heads: int, groups: int) -> None:
    """Prefill in blocks, then tokens one by one, against the sums over all queries of one causal matrix."""
    query, keys, valid, visible = case(heads, groups, 14)
    whole = attention_weights(query, keys, SCALE, visible)
    scores = None
    for start, end in ((0, 5), (5, 11), (11, 12), (12, 13), (13, 14)):
        block = attention_weights(query[:, :, start:end], keys[:, :, :end], SCALE, visible[:, start:end, :end])
        before = None if scores is None else scores.clone()
        after = accumulate(scores, block, valid[:, :end])
        assert scores is None or torch.equal(scores, before), "arguments stay as they are"
        scores = after
        close(scores, h2o_scores(whole[..., :end, :end], valid[:, :end]))
    close(scores, h2o_scores(whole, valid))


def test_h2o_after_an_eviction_continues_with_the_scores_of_what_was_kept() -> None:
    weights, valid = weights_of(4, 2, 3)
    scores = h2o_scores(weights, valid)
    index, is_real = keep_positions(scores, valid, 8, recent=2)
    rest = scores.gather(-1, index)
    more = torch.rand(B, 2, 2, 1, 9)
    found = accumulate(rest, more, torch.ones(B, 9, dtype=torch.bool))
    close(found[..., :8], rest + more[..., 0, :8].mean(2))
    close(found[..., 8], more[..., 0, 8].mean(2))
    assert bool(is_real[0].all())
    assert not bool(is_real[2].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_key_norms_equal_a_textbook(dtype: torch.dtype) -> None:
    keys = (torch.randn(2, 3, 7, D) * (200 if dtype == torch.float16 else 1)).to(dtype)
    found = key_norm_scores(keys)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(2):
        for g in range(3):
            for s in range(7):
                norm = math.sqrt(sum(float(value) ** 2 for value in keys[b, g, s]))
                assert float(found[b, g, s]) == pytest.approx(-norm, rel=1e-5)


def test_keys_of_small_norm_are_kept() -> None:
    keys = torch.tensor([3.0, 1.0, 2.0, 5.0])[None, None, :, None].expand(1, 1, 4, D)
    index, _ = keep_positions(key_norm_scores(keys), torch.ones(1, 4, dtype=torch.bool), 2)
    assert index.tolist() == [[[1, 2]]]


def textbook_choice(scores: list[float], valid: list[bool], keep: int, sinks: int, recent: int) -> list[int]:
    """One row of one head: always kept, then the best one after the other, then the last padding."""
    real = [s for s, is_real in enumerate(valid) if is_real]
    chosen = set(real[:sinks]) | set(real[len(real) - min(recent, len(real)) :])
    while len(chosen) < min(keep, len(real)):
        best = None
        for s in real:
            if s not in chosen and (best is None or scores[s] >= scores[best]):
                best = s
        chosen.add(best)  # type: ignore[arg-type]
    padding = [s for s, is_real in enumerate(valid) if not is_real]
    while len(chosen) < keep:
        chosen.add(padding.pop())
    return sorted(chosen)


@pytest.mark.parametrize("levels", [1, 3, 1000], ids="{} levels of scores".format)
def test_choice_equals_a_textbook(levels: int) -> None:
    """Few levels of scores make ties; rows are padded on the left, with nothing at all, or in between."""
    dice = random.Random(levels)
    for _ in range(150):
        positions, groups = dice.randint(1, 14), dice.randint(1, 3)
        keep = dice.randint(1, positions)
        sinks = dice.randint(0, keep)
        recent = dice.randint(0, keep - sinks)
        valid = [[s >= dice.randint(0, positions) for s in range(positions)] for _ in range(B)]
        pad = dice.randint(0, positions)
        valid[0] = [s >= pad for s in range(positions)]
        scores = [[[float(dice.randrange(levels)) for _ in range(positions)] for _ in range(groups)] for _ in range(B)]
        index, is_real = keep_positions(torch.tensor(scores), torch.tensor(valid), keep, sinks, recent)
        assert index.dtype == torch.int64
        expected = [[textbook_choice(row, valid[b], keep, sinks, recent) for row in scores[b]] for b in range(B)]
        assert index.tolist() == expected
        assert is_real.tolist() == [[[valid[b][s] for s in head] for head in expected[b]] for b in range(B)]


def test_ties_keep_the_later_position() -> None:
    valid = torch.ones(1, 6, dtype=torch.bool)
    scores = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0, 1.0]]])
    assert keep_positions(scores, valid, 3)[0].tolist() == [[[0, 3, 5]]]
    assert keep_positions(torch.zeros(1, 1, 6), valid, 2)[0].tolist() == [[[4, 5]]]


@pytest.mark.parametrize("value", [-math.inf, -1e30, math.nan, -3.0])
def test_padding_is_never_preferred_to_the_worst_position(value: float) -> None:
    valid = torch.tensor([[False, False, True, True, True]])
    scores = torch.tensor([[[math.inf, 1e30, value, value, value]]])
    index, is_real = keep_positions(scores, valid, 3)
    assert index.tolist() == [[[2, 3, 4]]]
    assert bool(is_real.all())
    index, is_real = keep_positions(scores, valid, 4, sinks=1, recent=1)
    assert index.tolist() == [[[1, 2, 3, 4]]]
    assert is_real.tolist() == [[[False, True, True, True]]]
    gap = torch.tensor([[True, False, True]])
    assert keep_positions(torch.tensor([[[value, 1.0, 0.0]]]), gap, 2)[0].tolist() == [[[0, 2]]]


def test_infinite_scores_do_not_displace_sinks_and_a_nan_is_the_lowest() -> None:
    valid = torch.ones(1, 6, dtype=torch.bool)
    scores = torch.tensor([[[0.0, math.inf, math.inf, math.nan, -1.0, 0.5]]])
    assert keep_positions(scores, valid, 3, sinks=1)[0].tolist() == [[[0, 1, 2]]]
    assert keep_positions(scores, valid, 5)[0].tolist() == [[[0, 1, 2, 4, 5]]]


def test_streaming_keeps_sinks_after_the_padding_and_the_last() -> None:
    valid = torch.arange(9) >= torch.tensor([0, 3, 7])[:, None]
    index, is_real = keep_positions(None, valid, 5, sinks=2, recent=3)
    assert index.tolist() == [[[0, 1, 6, 7, 8]], [[3, 4, 6, 7, 8]], [[4, 5, 6, 7, 8]]]
    assert is_real[:2].all()
    assert is_real[2].tolist() == [[False, False, False, True, True]]


def scores_by(method: str, query: Tensor, keys: Tensor, valid: Tensor, visible: Tensor) -> Tensor | None:
    weights = attention_weights(query, keys, SCALE, visible)
    if method == "snapkv":
        return snapkv_scores(weights[..., -3:, :], valid, 5)
    scores = {"h2o": h2o_scores, "tova": tova_scores}
    if method in scores:
        return scores[method](weights, valid)
    return key_norm_scores(keys) if method == "key-norm" else None


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_row_keeps_what_it_keeps_alone(method: str) -> None:
    """Six of 14 positions of rows of 14, 10 and 5: the last is shorter, keeps all it has and is filled up."""
    query, keys, valid, visible = case(4, 2, 14)
    keep, sinks, recent = (6, 2, 4) if method == "streaming" else (6, 1, 2)
    index, is_real = keep_positions(scores_by(method, query, keys, valid, visible), valid, keep, sinks, recent)
    for b, pad in enumerate(PADS):
        one = slice(b, b + 1)
        alone = query[one, :, pad:], keys[one, :, pad:], valid[one, pad:], visible[one, pad:, pad:]
        count = min(keep, 14 - pad)
        if count == keep:
            expected, _ = keep_positions(scores_by(method, *alone), alone[2], keep, sinks, recent)
        else:
            expected = torch.arange(14 - pad).expand(1, index.shape[1], -1)
        assert torch.equal(index[one, :, keep - count :], expected + pad)
        assert is_real[b].tolist() == [[False] * (keep - count) + [True] * count] * index.shape[1]


@pytest.mark.parametrize("method", METHODS)
def test_heads_choose_alike_or_each_for_itself(method: str) -> None:
    query, keys, valid, visible = case(8, 4, 14)
    scores = scores_by(method, query, keys, valid, visible)
    if method in ("streaming", "tova"):
        assert scores is None or bool((scores == scores[:, :1]).all())
    else:
        assert scores is not None
        index, _ = keep_positions(scores, valid, 5)
        assert not torch.equal(index[0, 0], index[0, 1])
    assert METHODS[method].needs_queries == (method in ("snapkv", "h2o", "tova"))


def test_kept_states_are_those_at_the_positions() -> None:
    states = torch.randn(2, 3, 9, 4)
    index = torch.stack([torch.stack([torch.randperm(9)[:5].sort().values for _ in range(3)]) for _ in range(2)])
    found = kept(states, index)
    for b in range(2):
        for g in range(3):
            assert torch.equal(found[b, g], states[b, g, index[b, g]])
    assert torch.equal(kept(states, index[:, :1]), kept(states, index[:, :1].expand(2, 3, 5)))


@pytest.mark.parametrize(
    "keep, sinks, recent, message",
    [
        (3, 2, 2, r"keep=3 is less than sinks \+ recent = 2 \+ 2"),
        (3, -1, 2, "must not be negative: -1, 2"),
        (3, 1, -2, "must not be negative: 1, -2"),
        (0, 0, 0, "keep must be 1 to 5, the number of positions, not 0"),
        (6, 1, 1, "keep must be 1 to 5, the number of positions, not 6"),
    ],
)
def test_counts_that_do_not_fit_are_refused(keep: int, sinks: int, recent: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_positions(torch.zeros(1, 1, 5), torch.ones(1, 5, dtype=torch.bool), keep, sinks, recent)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weights, valid = weights_of(4, 2, 3)
    query, keys, _, visible = case(4, 2, 3)
    with pytest.raises(ValueError, match=r"without scores keep=4 must be sinks \+ recent = 1 \+ 2"):
        keep_positions(None, valid, 4, 1, 2)
    with pytest.raises(ValueError, match=r"scores must be \[3, G, 14\], not \[3, 2, 13\]"):
        keep_positions(torch.zeros(B, 2, 13), valid, 4)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attention_weights(query[:, :3], keys, SCALE, visible)
    with pytest.raises(ValueError, match=r"visible must be \[3, 3, 14\], not \[3, 2, 14\]"):
        attention_weights(query, keys, SCALE, visible[:, 1:])
    for score in (snapkv_scores, h2o_scores, tova_scores):
        with pytest.raises(ValueError, match=r"\[3, 2, 2, 3, 14\], \[3, 13\]"):
            score(weights, valid[:, 1:])
    with pytest.raises(ValueError, match="odd and positive, not 4"):
        snapkv_scores(weights, valid, 4)
    with pytest.raises(ValueError, match="not 'median'"):
        snapkv_scores(weights, valid, 5, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a window of 3 queries does not fit 2"):
        snapkv_scores(weights[..., :2], valid[:, :2])
    with pytest.raises(ValueError, match="do not continue"):
        accumulate(torch.zeros(B, 2, 15), weights, valid)
    with pytest.raises(ValueError, match="do not continue"):
        accumulate(torch.zeros(B, 1, 5), weights, valid)
