"""Tokens chosen natively are those of transformers' processors and torch's draw, and so is the generator's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import KINDS, RULES, drawn, scores_of

from hf_accel.kernels import native
from hf_accel.kernels.native import Rules

pytestmark = pytest.mark.native


@pytest.fixture(params=native.supported_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> Any:
    before = native.status().isa
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def is_stocks(logits: torch.Tensor, ids: torch.Tensor, rules: Rules) -> bool:
    """Check a choice against stock's, from the generator's state; return whether it was made."""
    state = torch.get_rng_state()
    before = state.clone()
    tokens = native.choose(logits, None if rules.penalty is None else ids, None, rules, state)
    expected = drawn(logits, ids, rules)
    if tokens is None:
        assert torch.equal(state, before), "the state of a choice that was not made"
        return False
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(state, torch.get_rng_state()), "another state of the generator"
    return True


@pytest.mark.parametrize("passed", [0, 1, 7, 623, 624, 625])
def test_exponentials_are_torchs(isa: str, passed: int) -> None:
    for count in (1, 2, 311, 312, 313, 624, 5000):
        torch.manual_seed(count)
        torch.rand(passed)  # a word each
        torch.randn(passed % 2)  # leaves a number for the next one, which is kept
        state = torch.get_rng_state()
        expected = torch.empty(count).exponential_(1)
        assert torch.equal(native.exponentials(state, count), expected)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES)
def test_tokens_are_stocks(isa: str, rules: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(hash_of(rules + kind))
    made, asked = 0, 0
    for vocabulary, draws in ((1, 2), (5, 12), (128, 12), (1000, 8), (9000, 2)):
        for draw in range(draws):
            rows = 1 + draw % 3
            ids = torch.randint(0, vocabulary + 3, (rows, 9), generator=generator)  # some are in no vocabulary
            made += is_stocks(scores_of(kind, rows, vocabulary, generator), ids, RULES[rules])
            asked += 1
    if kind in ("smooth", "one high", "flat", "bf16"):
        assert made > 0.8 * asked, "a choice is hardly ever made"


def hash_of(text: str) -> int:
    return sum(ord(letter) * (index + 1) for index, letter in enumerate(text))


@settings(max_examples=300)
@given(data=st.data())
def test_tokens_are_stocks_whatever_the_scores(data: st.DataObject) -> None:
    """Few levels, so that scores are equal at the k-th place and where top-p ends."""
    vocabulary = data.draw(st.integers(1, 700))
    rows = data.draw(st.integers(1, 3))
    levels = data.draw(st.sampled_from([1, 2, 3, 8, 50, 100_000]))
    scale = data.draw(st.sampled_from([1e-3, 0.1, 1.0, 5.0, 40.0]))
    share = st.one_of(
        st.none(), st.sampled_from([0.0, 1e-6, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999999, 1.0]), st.floats(0, 1)
    )
    rules = Rules(
        penalty=data.draw(st.one_of(st.none(), st.floats(0.1, 5.0))),
        temperature=data.draw(st.one_of(st.none(), st.sampled_from([1e-30, 0.05, 0.3, 3.0, 1e6]), st.floats(0.1, 3.0))),
        top_k=data.draw(st.one_of(st.none(), st.integers(1, 800))),
        top_p=data.draw(share),
        min_p=data.draw(share),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits = (torch.randint(levels, (rows, vocabulary), generator=generator) / levels - 0.4) * 10 * scale
    ids = torch.randint(vocabulary, (rows, data.draw(st.integers(0, 5))), generator=generator)
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    try:
        is_stocks(logits.to(dtype), ids, rules)
    except RuntimeError:  # stock's own: quotients are infinite
        assert native.choose(logits.to(dtype), ids, None, rules, torch.get_rng_state()) is None


def test_the_penalty_begins_where_it_is_told_and_meets_a_token_once(isa: str) -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0], [4.0, 3.0, -1.0]])
    ids = torch.tensor([[0, 0, 0], [0, 1, 1]])
    rules = Rules(penalty=1.2)
    assert native.choose(logits, ids, None, rules, None).tolist() == [0, 0]  # type: ignore[union-attr]
    assert native.choose(logits, ids, [0, 1], Rules(penalty=1.5), None).tolist() == [1, 0]  # type: ignore[union-attr]
    assert native.choose(-logits.abs(), ids, [0, 3], Rules(penalty=0.01), None).tolist() == [0, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_left_to_stock(isa: str, wrong: float) -> None:
    for place in (0, 17, 299):
        for rules in RULES.values():
            logits = torch.randn(2, 300)
            logits[1, place] = wrong
            state = torch.get_rng_state()
            before = state.clone()
            assert native.choose(logits, None, None, rules, state) is None
            assert native.choose(logits, None, None, rules, None) is None
            assert torch.equal(state, before)
    assert native.choose(torch.full((1, 300), -torch.inf), None, None, Rules(), torch.get_rng_state()) is None


def test_what_is_no_state_is_refused() -> None:
    for state in (torch.zeros(5056, dtype=torch.uint8), torch.full((5056,), 255, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="no state"):
            native.exponentials(state, 3)
        with pytest.raises(ValueError, match="no input"):
            native.choose(torch.zeros(1, 5), None, None, Rules(), state)
    with pytest.raises(ValueError, match="no input"):
        native.choose(torch.zeros(1, 5), None, [-1], Rules(), None)
