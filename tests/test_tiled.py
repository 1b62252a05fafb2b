"""The tiled reference against the definition of attention, written out with one softmax over a full row in float64."""

from __future__ import annotations

import pytest
import torch
from test_attention import Largest

from hf_accel.ops import tiled
from hf_accel.ops.tiled import tiled_attention, with_sinks


def textbook(query, key, value, scale, visible, summand=None, softcap=None, sinks=None):
    """Attention [B, H, T, Dv] and log-sum-exp [B, H, T] by the definition; visible: bool [B, H, T, S]."""
    ratio = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(ratio, 1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if summand is not None:
        scores = scores + summand
    scores = scores.masked_fill(~visible, -torch.inf)
    extra = [] if sinks is None else [sinks[None, :, None, None].expand(*scores.shape[:3], 1)]
    joined = torch.cat([scores, *extra], -1)
    weights = torch.softmax(joined, -1).nan_to_num(0.0)[..., : key.shape[2]]
    return weights @ value, torch.logsumexp(joined, -1)


def visible_of(batch, heads, tokens, positions, is_causal=True, window=None, starts=None):
    """The mask by its definition, entry by entry."""
    mask = torch.zeros(batch, heads, tokens, positions, dtype=torch.bool)
    for b in range(batch):
        for t in range(tokens):
            end = positions - tokens + t
            for s in range(positions):
                sees = not is_causal or s <= end
                sees &= window is None or s > end - window
                mask[b, :, t, s] = sees and (starts is None or s >= int(starts[b]))
    return mask


def states(batch=2, heads=6, groups=2, tokens=11, positions=11, sizes=(8, 5), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return (
        make(batch, heads, tokens, sizes[0]),
        make(batch, groups, positions, sizes[0]),
        make(batch, groups, positions, sizes[1]),
    )


STARTS = torch.tensor([3, 0])
CALLS = {
    "full": {"is_causal": False},
    "causal": {},
    "window": {"window": 3},
    "padding": {"starts": STARTS},
    "padding and window": {"starts": STARTS, "window": 4},
    "padding that nobody is behind": {"starts": torch.tensor([11, 2])},
    "not causal, padding": {"is_causal": False, "starts": STARTS},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "QUERY_TILE", 4)
    monkeypatch.setattr(tiled, "KEY_TILE", 3)


@pytest.mark.parametrize("past", [0, 6])
@pytest.mark.parametrize("title", CALLS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_equal_to_the_definition(title: str, past: int, softcap: float | None, has_sinks: bool) -> None:
    query, key, value = states(positions=11 + past)
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64) if has_sinks else None
    visible = visible_of(2, 6, 11, 11 + past, **CALLS[title])
    expected, total = textbook(query, key, value, 0.4, visible, None, softcap, sinks)
    found, lse = tiled_attention(query, key, value, scale=0.4, softcap=softcap, sinks=sinks, **CALLS[title])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, total, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "tree", "summand"])
def test_masks(kind: str, rows: int, columns: int) -> None:
    query, key, value = states()
    generator = torch.Generator().manual_seed(5)
    shown = torch.rand(rows, columns, 11, 11, generator=generator) > 0.5
    if kind == "tree":  # every token sees its ancestors and itself
        parents = [-1, 0, 0, 1, 1, 2, 4, 4, 7, 3, 8]
        shown = torch.eye(11, dtype=torch.bool).expand(rows, columns, 11, 11).clone()
        for token, parent in enumerate(parents):
            shown[..., token, :] |= shown[..., parent, :] if parent >= 0 else False
    summand = torch.randn(rows, columns, 11, 11, generator=generator).double() if kind == "summand" else None
    visible = torch.ones(2, 6, 11, 11, dtype=torch.bool) if kind == "summand" else shown.expand(2, 6, 11, 11)
    expected, total = textbook(query, key, value, 8**-0.5, visible, summand)
    found, lse = tiled_attention(query, key, value, is_causal=False, mask=shown if summand is None else summand)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, total, atol=1e-12, rtol=1e-12)


def test_a_mask_beside_causality_and_padding() -> None:
    query, key, value = states()
    shown = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    visible = visible_of(2, 6, 11, 11, starts=STARTS) & shown
    expected, _ = textbook(query, key, value, 8**-0.5, visible)
    found, _ = tiled_attention(query, key, value, starts=STARTS, mask=shown)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_queries_that_see_nothing_are_zero_and_no_sum() -> None:
    query, key, value = states()
    found, lse = tiled_attention(query, key, value, starts=torch.tensor([4, 0]))
    assert bool((found[0, :, :4] == 0).all())
    assert bool((lse[0, :, :4] == -torch.inf).all())
    assert bool(lse[:, :, 4:].isfinite().all())


def test_large_scores_do_not_overflow() -> None:
    query, key, value = states(dtype=torch.float32)
    found, lse = tiled_attention(query * 1e4, key * 1e4, value)
    assert bool(found.isfinite().all())
    assert float(lse.max()) > 1e6


def test_parts_are_merged_by_their_log_sum_exp() -> None:
    query, key, value = states(positions=20)
    whole, total = tiled_attention(query, key, value, is_causal=False)
    parts = [tiled_attention(query, key[:, :, s], value[:, :, s], is_causal=False) for s in (slice(7), slice(7, 20))]
    merged = sum(out * torch.exp(lse - total)[..., None] for out, lse in parts)
    torch.testing.assert_close(merged, whole, atol=1e-12, rtol=1e-12)


def test_sinks_can_be_added_afterwards() -> None:
    query, key, value = states()
    sinks = torch.linspace(-3, 3, 6, dtype=torch.float64)
    plain = tiled_attention(query, key, value)
    for found, expected in zip(with_sinks(*plain, sinks), tiled_attention(query, key, value, sinks=sinks), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_rounds_once(dtype: torch.dtype, bound: float) -> None:
    query, key, value = states(tokens=40, positions=40, dtype=dtype)
    expected, _ = tiled_attention(query.double(), key.double(), value.double())
    found, lse = tiled_attention(query, key, value)
    assert found.dtype is dtype
    assert lse.dtype is torch.float32
    assert float((found.double() - expected).norm() / expected.norm()) < bound


def test_memory_is_linear_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "QUERY_TILE", 32)
    monkeypatch.setattr(tiled, "KEY_TILE", 32)
    query, key, value = states(1, 2, 1, 600, 600, (4, 4), torch.float32)
    with Largest() as largest:
        tiled_attention(query, key, value)
    assert largest.elements <= 2 * 600 * 4


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = states()
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        tiled_attention(query[:, :5], key, value)
    with pytest.raises(ValueError, match="window"):
        tiled_attention(query, key, value, is_causal=False, window=3)
