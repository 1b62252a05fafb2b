"""Handles of what a cache holds: they stand for tensors anywhere, and attention reads what they describe as it lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from hf_accel.attention.grouped import MAX_QUERIES, grouped_attention_forward
from hf_accel.attention.held import held_attention
from hf_accel.cache.codec import Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.core.calls.held import CachedStates, Held
from hf_accel.errors import UnsupportedModelError
from hf_accel.kernels import native
from hf_accel.ops import attention as attention_module
from hf_accel.ops import cached
from hf_accel.ops.attention import AttentionState, partial_attention

BITS = [None, 8, 4]
HEADS, GROUPS, SIZES = 6, 2, (16, 24)
# codes: queries and weights are rounded, too (8 bits in 4-bit scores), unless keys and values are decoded first
TOLERANCES = {None: 2e-6, 8: 3e-4, 4: 3e-2}


class Kept:
    """Keys and values as a cache may hold them, in parts; `dense` is what they read as."""

    def __init__(
        self, bits: int | None, tokens: int = 40, cuts: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        states = [torch.randn(2, GROUPS, tokens, size).to(dtype) for size in SIZES]
        self.codec, self.asked = Codec(bits), 0
        self.rows = [self.codec.encode(x, is_key=i == 0) for i, x in enumerate(states)]
        self.bounds = list(zip((0, *cuts), (*cuts, tokens), strict=True))
        self.held = Held((2, GROUPS, tokens), SIZES, (dtype, dtype), torch.device("cpu"), bits, self.parts)
        self.dense = states
        if bits is not None:
            pairs = enumerate(zip(self.rows, SIZES, strict=True))
            self.dense = [cached.decode(x, bits, size, dtype, is_key=i == 0) for i, (x, size) in pairs]
        self.key, self.value = self.held.states()

    def parts(self) -> Any:
        """As a cache that has one place for what it fetches: each part is overwritten by the next."""
        self.asked += 1
        place = [torch.empty_like(x) for x in self.rows]
        for first, stop in self.bounds:
            found = [x[:, :, : stop - first] for x in place]
            for to, x in zip(found, self.rows, strict=True):
                to.copy_(x[:, :, first:stop])
            yield found[0], found[1]
            for to in found:
                to.fill_(math.nan if to.is_floating_point() else 255)


def expected_attention(query: Tensor, dense: list[Tensor], mask: Tensor | None, scale: float | None = None) -> Tensor:
    keys, values = (repeat_kv(x.double(), HEADS // GROUPS) for x in dense)
    mask = mask if mask is None or mask.dtype is torch.bool else mask.double()
    return scaled_dot_product_attention(query.double(), keys, values, mask, scale=scale).transpose(1, 2)


def near(found: Tensor, expected: Tensor, limit: float) -> bool:
    return bool((found.double() - expected).norm() <= limit * expected.norm())


def causal(tokens: int, positions: int) -> Tensor:
    return torch.ones(1, 1, tokens, positions, dtype=torch.bool).tril(positions - tokens)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "matmul": lambda k, v: torch.matmul(torch.ones(2, GROUPS, 3, 16), k.transpose(2, 3)),
    "operator": lambda k, v: v.mT @ (k + 1),
    "index": lambda k, v: (k[0], v[..., 1:3, :], k[:, :, -5:], v[:, 0, torch.tensor([3, 1])]),
    "cat": lambda k, v: torch.cat([k, torch.zeros(2, GROUPS, 1, 16), k], dim=-2),
    "stack": lambda k, v: torch.stack([k, k]),
    "repeat_kv": lambda k, v: (repeat_kv(k, 3), repeat_kv(v, 2)),
    "float": lambda k, v: (k.double(), v.to(torch.float16), k.bfloat16()),
    "sdpa": lambda k, v: scaled_dot_product_attention(torch.ones(2, GROUPS, 3, 16), k, v),
    "einsum": lambda k, v: torch.einsum("bgsd,bgse->bgde", k, v),
    "reshape": lambda k, v: (k.reshape(4, -1), v.flatten(1), k.permute(2, 0, 1, 3).contiguous(), v.unsqueeze(2)),
    "expand": lambda k, v: k[:, :, None].expand(2, GROUPS, 3, 40, 16),
    "copy": lambda k, v: torch.empty(2, GROUPS, 40, 16).copy_(k),
    "select": lambda k, v: (k.index_select(0, torch.tensor([1])), v.narrow(2, 3, 4), *k.split(20, dim=2)),
    "likes": lambda k, v: (torch.zeros_like(k), v.new_ones(2), torch.ones_like(v, dtype=torch.int32)),
    "numbers": lambda k, v: (torch.tensor(k.sum().item()), k.max(), v.isnan(), torch.tensor(torch.equal(k, k))),
    "where": lambda k, v: torch.where(k > 0, k, torch.zeros(())),
    "keyword": lambda k, v: torch.mul(input=k, other=k),
    "clone": lambda k, v: (k.clone(), v.detach() + 0.0),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_handles_stand_for_their_tensors(operation: Callable[[Tensor, Tensor], Any], bits: int | None) -> None:
    kept = Kept(bits, 40, (7, 8, 30))
    found, expected = operation(kept.key, kept.value), operation(*kept.dense)
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is Tensor
        assert torch.equal(ours, theirs)
    assert kept.asked == 1


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_handles_look_like_their_tensors(bits: int | None, dtype: torch.dtype) -> None:
    kept = Kept(bits, dtype=dtype)
    for handle, dense in zip((kept.key, kept.value), kept.dense, strict=True):
        assert isinstance(handle, Tensor)
        assert (handle.shape, handle.dtype, handle.device) == (dense.shape, dense.dtype, dense.device)
        assert (handle.stride(), handle.is_contiguous()) == (dense.stride(), True)
        assert (handle.numel(), handle.dim(), handle.requires_grad) == (dense.numel(), 4, False)
    assert "values" in repr(kept.value)
    assert kept.asked == 0, "looking costs nothing"


@pytest.mark.parametrize("bits", BITS)
def test_decoding_happens_once_in_a_layer_and_step(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, decode = [], cached.decode

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["is_key"])
        return decode(*args, **kwargs)

    monkeypatch.setattr(cached, "decode", counted)
    layer = GrowingLayer(0, Codec(bits))
    for step in range(3):
        key, value = layer.update(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
        for _ in range(3):
            repeat_kv(key, 2).sum(), value.float(), key[:, :, -1:]
        assert calls == [] if bits is None else [True, False] * (step + 1)
    kept = Kept(bits)
    for _ in range(3):
        kept.value.sum(), kept.key.sum()
    assert kept.asked == 1


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cuts", [(), (1,), (13, 14, 39), (20, 20)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, MAX_QUERIES, MAX_QUERIES + 1, 40])
def test_attention_equals_stock_over_the_tensors(
    tokens: int, cuts: tuple[int, ...], bits: int | None, dtype: torch.dtype
) -> None:
    kept, query = Kept(bits, 40, cuts, dtype), torch.randn(2, HEADS, tokens, 16).to(dtype)
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    holes = causal(tokens, 40) & (torch.rand(2, 1, tokens, 40) < 0.7)
    holes[..., 0] = True
    # more tokens than a step: decoded first, so that only the order of sums differs
    limit = TOLERANCES[bits if tokens <= MAX_QUERIES else None] + {4: 0.0, 2: torch.finfo(dtype).eps}[dtype.itemsize]
    for mask, effective in (
        (None, causal(tokens, 40)),
        (holes, holes),
        (holes[:1], holes[:1]),
        (torch.zeros(holes.shape, dtype=dtype).masked_fill(~holes, torch.finfo(dtype).min), holes),
        (torch.zeros(holes.shape, dtype=dtype).masked_fill(~holes, -math.inf)[1:], holes[1:]),
    ):
        found, weights = grouped_attention_forward(module, query, kept.key, kept.value, mask)  # type: ignore[arg-type]
        assert weights is None
        assert found.dtype is dtype
        assert found.is_contiguous()
        assert near(found, expected_attention(query, kept.dense, effective), limit)
    given_scale = grouped_attention_forward(
        module,
        query,
        kept.key,
        kept.value,
        None,
        scaling=0.7,
        is_causal=False,  # type: ignore[arg-type]
    )[0]
    assert near(given_scale, expected_attention(query, kept.dense, None, 0.7), 3 * limit)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_attention_without_the_native_library(tokens: int, bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_available", lambda: False)
    kept, query = Kept(bits, 40, (9,)), torch.randn(2, HEADS, tokens, 16)
    found = held_attention(query, kept.held, None, None).transpose(1, 2)
    assert near(found, expected_attention(query, kept.dense, causal(tokens, 40)), TOLERANCES[None])


@pytest.mark.parametrize("tokens", [2, 20])
def test_soft_caps(tokens: int) -> None:
    kept, query = Kept(8, 40, (9,)), torch.randn(2, HEADS, tokens, 16) * 3
    keys, values = (repeat_kv(x, 3) for x in kept.dense)
    scores = torch.tanh(query @ keys.mT / 4 / 2.0) * 2.0
    expected = scores.masked_fill(~causal(tokens, 40), -math.inf).softmax(-1) @ values
    found = grouped_attention_forward(None, query, kept.key, kept.value, None, softcap=2.0)[0]  # type: ignore[arg-type]
    assert near(found, expected.transpose(1, 2).double(), TOLERANCES[8])


def test_what_attention_does_not_know_is_left_to_stock() -> None:
    """Keys of one holder with values of none or another are tensors like any."""
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    kept, other, query = Kept(8), Kept(8), torch.randn(2, HEADS, 1, 16)
    for value in (other.value, other.dense[1]):
        found = grouped_attention_forward(module, query, kept.key, value, None)[0]
        assert near(found, expected_attention(query, [kept.dense[0], other.dense[1]], None), 2e-6)
    dropped = grouped_attention_forward(module, query, kept.key, kept.value, None, dropout=0.999)[0]
    assert (dropped == 0).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 5, 18])
def test_a_mask_that_is_more_than_visible_or_not_is_added(tokens: int, bits: int | None) -> None:
    kept, query = Kept(bits, 40, (11, 30)), torch.randn(2, HEADS, tokens, 16)
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    bias = torch.randn(2, 1, tokens, 40).masked_fill(~causal(tokens, 40), -math.inf)
    found = grouped_attention_forward(module, query, kept.key, kept.value, bias)[0]
    assert near(found, expected_attention(query, kept.dense, bias), TOLERANCES[None])


@pytest.mark.parametrize("tokens", [5, 18])
def test_a_module_that_is_not_causal_sees_all(tokens: int) -> None:
    kept, query = Kept(None, 40, (11, 30)), torch.randn(2, HEADS, tokens, 16)
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=False)
    found = grouped_attention_forward(module, query, kept.key, kept.value, None)[0]
    assert near(found, expected_attention(query, kept.dense, None), TOLERANCES[None])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 5, 18])
def test_positions_that_were_given_up(tokens: int, bits: int | None) -> None:
    kept, query, seen = Kept(bits, 40, (11, 30)), torch.randn(2, HEADS, tokens, 16), []
    kept.held.visible = torch.rand(2, GROUPS, 40) < 0.5
    kept.held.visible[..., -tokens:] = True
    kept.held.observe = lambda *given: seen.append(given)
    mask = kept.held.visible.repeat_interleave(3, dim=1)[:, :, None] & causal(tokens, 40)
    foreign = torch.ones(2, 1, tokens, 3, dtype=torch.bool)  # made for positions: nothing of it fits
    found = held_attention(query, kept.held, foreign, None).transpose(1, 2)
    assert near(found, expected_attention(query, kept.dense, mask), TOLERANCES[bits if tokens <= 16 else None])
    assert len(seen) == 1
    assert seen[0][0] is query
    assert seen[0][1] == 0.25
    with pytest.raises(UnsupportedModelError, match="given positions up"):
        kept.key.double()


def test_a_cache_that_holds_nothing() -> None:
    held = Held((2, GROUPS, 0), SIZES, (torch.float32,) * 2, torch.device("cpu"), 8, lambda: iter(()))
    assert not held_attention(torch.randn(2, HEADS, 1, 16), held, None, None).any()
    assert held.states()[1].sum() == 0
    assert held.states()[1].shape == (2, GROUPS, 0, 24)


def slow_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[list[float], float, float]:
    """Return values [Dv] weighted by exp(score - top), `top` and the sum of weights of one query [D], in loops."""
    scores = []
    for j in range(key.shape[0]):
        score = scale * sum(q * k for q, k in zip(query.tolist(), key[j].tolist(), strict=True))
        score = math.tanh(score / softcap) * softcap if softcap else score
        scores.append(score if mask[j] else -math.inf)
    top = max(scores)
    weights = [0.0 if score == -math.inf else math.exp(score - top) for score in scores]
    columns = range(value.shape[1])
    return [sum(w * value[j, c].item() for j, w in enumerate(weights)) for c in columns], top, sum(weights)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_partial_attention_is_the_textbooks(
    shape: tuple[int, int], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 70, 5), torch.randn(2, 2, 70, 6)
    mask = torch.rand(*shape, 3, 70) < 0.5
    mask[0, 0, 1] = False
    states = []
    for scores in (1 << 23, 1):  # all keys at once, and as few as there may be
        monkeypatch.setattr(attention_module, "SCORES", scores)
        states.append(partial_attention(query, key, value, mask, 0.6, softcap))
    for b in range(2):
        for h in range(4):
            for t in range(3):
                own = mask[b % shape[0], h % shape[1], t]
                values, top, total = slow_attention(query[b, h, t], key[b, h // 2], value[b, h // 2], own, 0.6, softcap)
                for state in states:
                    assert torch.allclose(state.values[b, h, t], torch.tensor(values), atol=1e-5)
                    assert state.top[b, h, t].item() == pytest.approx(top, rel=1e-5, abs=1e-6)
                    assert state.sum[b, h, t].item() == pytest.approx(total, rel=1e-5)
    assert not states[0].result(torch.float32)[0, 0, 1].any()
    with pytest.raises(ValueError, match="no positions"):
        partial_attention(query, key[:, :, :0], value[:, :, :0], None, 1.0)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.floats(0.1, 60))
def test_merging_is_associative_and_hidden_parts_are_neutral(kinds: list[int], scale: float) -> None:
    def part(kind: int, seed: int) -> AttentionState:
        made = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(1, 2, 4, 8, generator=made) for _ in range(3))
        mask = torch.rand(1, 1, 4, 4, generator=made) < kind / 3
        return partial_attention(query, key, value, mask, scale)

    a, b, c = (part(kind, seed) for seed, kind in enumerate(kinds))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert torch.equal(left.top, right.top)
    assert torch.allclose(left.sum, right.sum, rtol=1e-5)
    assert torch.allclose(left.values, right.values, rtol=1e-4, atol=1e-5)
    nothing = part(0, 5)
    for merged in (a.merge(nothing), nothing.merge(a)):
        assert torch.equal(merged.top, a.top)
        assert torch.equal(merged.sum, a.sum)
        assert torch.equal(merged.values, a.values)
    a.values[0, 0, 0], a.top[0, 0, 0], a.sum[0, 0, 0] = math.nan, math.nan, math.nan
    for merged in (a.merge(b), b.merge(a)):
        strange = merged.result(torch.float32).isnan().all(-1)
        assert strange[0, 0, 0]
        assert strange.sum() == 1


@pytest.mark.parametrize("window", [None, 6])
def test_layers_return_handles_only_for_codes(window: int | None) -> None:
    for bits in BITS:
        layer: Any = GrowingLayer(0, Codec(bits)) if window is None else GrowingSlidingLayer(window, 0, Codec(bits))
        assert layer.bits == bits
        states = torch.randn(1, 2, 9, 8)
        key, value = layer.update(states, states)
        assert isinstance(key, CachedStates) is (bits is not None)
        assert isinstance(value, CachedStates) is (bits is not None)
        assert bits is None or key.held is value.held
        assert key.shape == (1, 2, 9, 8)
        assert layer.keys.shape[2] == (9 if window is None else window - 1)
