"""Speculation changes no text: every drafter, on every architecture, greedy and sampled, in steps of several tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import NAMES, build, padded, prompt
from speculating import (
    CIRCLE,
    ENDS,
    FEW_TOKENS,
    always,
    ask,
    assert_stock,
    counts,
    noisy,
    shared,
    speculating,
    total,
)

import hf_accel
from hf_accel import DecodingConfig, KVCacheConfig, WeightOnlyConfig
from hf_accel.core.calls.rows import Rows
from hf_accel.speculative.acceptance import DECAY, Acceptance
from hf_accel.speculative.drafters.lookup import LookupDrafter
from hf_accel.speculative.session import SpeculativeSession

PLAIN = [DecodingConfig(), KVCacheConfig()]
WINDOWS = ["mistral", "gemma2", "gemma3"]
DRAFTERS: list[Any] = ["lookup", "self", "model"]
LISTS: list[Any] = ["layer_skip", ("lookup", "self"), ("model", "lookup")]
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "few tokens": {"suppress_tokens": FEW_TOKENS},
    "to the end": ENDS | {"min_new_tokens": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9, 20]]},
    "sampling": {"do_sample": True},
    "sampling few tokens": {"do_sample": True, "suppress_tokens": FEW_TOKENS, "top_k": 4},
    "warped": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "typical": {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_k": 0},
    "sampling to the end": ENDS | {"do_sample": True, "top_k": 30},
    "sampling with everything": ENDS
    | CIRCLE
    | {
        "do_sample": True,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "exponential_decay_length_penalty": (5, 1.1),
        "begin_suppress_tokens": [100, 101],
        "forced_eos_token_id": 21,
        "top_p": 0.95,
        "renormalize_logits": True,
    },
}


@pytest.mark.parametrize("drafter", ["model", ("lookup", "self")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, drafter: Any) -> None:
    model = shared(name, drafter)
    before = counts(model)
    assert_stock(model, name, 4, **CALLS["few tokens"])
    assert_stock(model, name, 1, **CALLS["sampling to the end"])
    after = counts(model)
    assert not after["plain_calls"]
    assert after["calls"] == before["calls"] + 2
    assert total(after, "accepted") > total(before, "accepted")


@pytest.mark.parametrize("title", CALLS)
@pytest.mark.parametrize("drafter", DRAFTERS + LISTS, ids=str)
def test_every_drafter(drafter: Any, title: str) -> None:
    assert_stock(shared("llama", drafter), "llama", 4, **CALLS[title])
    if title == "sampling with everything":
        assert_stock(shared("llama", drafter), "llama", 1, **CALLS[title])


@pytest.mark.parametrize("title", CALLS)
@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_every_call(name: str, title: str) -> None:
    assert_stock(shared(name, ("lookup", "model")), name, 4, **CALLS[title])


@pytest.mark.parametrize("drafter", DRAFTERS, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_far_past_the_window(name: str, drafter: Any) -> None:
    """A window of 8 tokens: the text grows to five times that, rows apart or not."""
    for rows, given in ((1, {}), (4, {"suppress_tokens": FEW_TOKENS, "do_sample": True})):
        assert_stock(shared(name, drafter), name, rows, max_new_tokens=40, **given)


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_end_at_different_times(seed: int) -> None:
    for title in ("to the end", "sampling to the end"):
        found = assert_stock(shared("gemma3", ("lookup", "model")), "gemma3", 4, seed, **CALLS[title])
        ids = found.result[:, 9:]
        assert ids.shape[1] > 1
    assert_stock(shared("gpt2", "model"), "gpt2", 4, seed, **CALLS["sampling to the end"])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_far_apart(name: str) -> None:
    """One row goes round in a circle and is done long before the others, for which a model then drafts."""
    model = speculating(name, ("lookup", "model"), max_draft_tokens=16)
    inputs = padded([7, 11])
    inputs["input_ids"][0, -5:] = torch.tensor([5, 6, 5, 6, 5])
    given = inputs | CIRCLE | {"do_sample": False, "max_new_tokens": 60}
    assert torch.equal(model.generate(**given), build(name).generate(**given))
    assert counts(model)["accepted"]["lookup"] > 40
    assert counts(model)["accepted"]["model"] > 10


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_over_weights_in_few_bits(name: str, bits: int) -> None:
    """The text is that of the same weights without speculation; on the CPU in fp32 both round alike."""
    model = speculating(name, ("lookup", "model"), [WeightOnlyConfig(bits=bits), *PLAIN])
    for rows in (1, 4):
        for title in ("few tokens", "sampling to the end"):
            texts = []
            for speculative in (False, True):
                torch.manual_seed(1)
                ids = ask(model, rows, speculative=speculative, **CALLS[title])
                texts.append((ids.tolist(), torch.rand(1).item()))
            assert texts[0] == texts[1]
    assert counts(model)["calls"] == 4
    assert total(counts(model), "accepted") > 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_plain_runs_between_drafts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain steps in between, as many as the dice say, with all that comes with them: rows ended ahead, draws, ends."""
    dice = random.Random(1)
    runs: list[int] = []

    def plain_steps(self: Any, limit: int) -> int:
        runs.append(max(0, min(dice.choice([0, 0, 1, 2, 5]), limit - 1)))
        return runs[-1]

    monkeypatch.setattr(SpeculativeSession, "plain_steps", plain_steps)
    for seed in range(3):
        for title in ("few tokens", "to the end", "sampling", "sampling to the end"):
            assert_stock(shared(name, ("lookup", "model")), name, 4, seed, **CALLS[title])
        assert_stock(shared(name, "self"), name, 1, seed, **CALLS["sampling to the end"])
    assert sum(runs) > 20


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_adaptive(name: str) -> None:
    """How much is drafted follows the clock; the text does not."""
    model = speculating(name, ("lookup", "model", "self"), adaptive=True, max_draft_tokens=8)
    for rows, title in ((1, "few tokens"), (4, "sampling few tokens"), (4, "to the end")):
        assert_stock(model, name, rows, **CALLS[title], max_new_tokens=30)
    assert not counts(model)["plain_calls"]


@pytest.mark.parametrize("most", [1, 2, 32])
def test_draft_lengths(most: int) -> None:
    model = speculating("llama", "self", max_draft_tokens=most)
    for title in ("few tokens", "sampling few tokens"):
        for rows in (1, 4):
            assert_stock(model, "llama", rows, **CALLS[title], max_new_tokens=24)
    found = counts(model)
    assert found["tokens_per_step"] > (1.5 if most == 1 else 2.5)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_exactly_as_many_tokens_as_asked_for(new_tokens: int) -> None:
    for name in ("llama", "gpt2"):
        for rows in (1, 4):
            found = assert_stock(shared(name, "self"), name, rows, max_new_tokens=new_tokens)
            assert found.result.shape[1] == (6 if rows == 1 else 9) + new_tokens
    before = counts(shared("llama", "self"))
    assert_stock(shared("llama", "self"), "llama", 1, max_new_tokens=new_tokens)
    after = counts(shared("llama", "self"))
    assert after["tokens"] == before["tokens"] + new_tokens - 1, "the first token is the prompt's"


@pytest.mark.parametrize("drafter", ["self", "model"])
@pytest.mark.parametrize("left", [1, 2, 3, 6, 9])
def test_the_context_is_used_up_exactly(left: int, drafter: str) -> None:
    """GPT-2 has a learned position for each of its 256 places, and none beyond."""
    reference = build("gpt2")
    ids = prompt(2, 256 - left)
    model = shared("gpt2", drafter)
    for rows in (1, 2):
        given = {"max_new_tokens": left, "do_sample": False, "attention_mask": torch.ones_like(ids[:rows])}
        found = model.generate(ids[:rows], **given)
        assert found.shape[1] == 256
        assert torch.equal(found, reference.generate(ids[:rows], **given))
    beyond = {"max_new_tokens": left + 2, "do_sample": False, "attention_mask": torch.ones_like(ids[:1])}
    for one in (reference, model):  # text beyond the context fails as ever
        with pytest.raises(IndexError):
            one.generate(ids[:1], **beyond)


def test_beyond_a_context_that_does_not_bind() -> None:
    """Rotary positions go on; drafting ends at the context that the config states."""
    models = []
    for _ in range(2):
        model = build("llama")
        model.config.max_position_embeddings = 56
        models.append(model)
    reference, model = models
    hf_accel.optimize(model, [*PLAIN, always("self")])
    given = padded([50, 41, 50]) | {"max_new_tokens": 14, "do_sample": False}
    assert torch.equal(model.generate(**given), reference.generate(**given))
    assert 0 < total(counts(model), "proposed") <= 3 * 5


def test_a_draft_model_with_a_shorter_context() -> None:
    draft = build("gpt2")
    draft.config.n_positions = 60
    draft.transformer.wpe.weight = torch.nn.Parameter(draft.transformer.wpe.weight[:60].clone())
    for rows in (1, 4):
        model = build("llama")
        hf_accel.optimize(model, [*PLAIN, always("model")], draft_model=draft)
        found = []
        for tokens in (54, 70):  # the draft's context ends in the text, and in the prompt
            given = padded([tokens] * rows) | {"max_new_tokens": 12, "do_sample": False}
            assert torch.equal(model.generate(**given), build("llama").generate(**given))
            found.append(total(counts(model), "proposed"))
        assert 0 < found[0] < 4 * rows * 12
        assert found[1] == found[0]


def test_a_draft_model_in_another_dtype_or_optimised_itself() -> None:
    half = build("gemma3").to(torch.bfloat16)
    fast = speculating("gemma3", "self")
    for draft, share in ((half, 0.5), (fast, 1.0)):
        before = {name: id(p) for name, p in draft.named_parameters()}
        model = build("gemma3")
        hf_accel.optimize(model, [*PLAIN, always("model")], draft_model=draft)
        assert_stock(model, "gemma3", 4, max_new_tokens=20)
        assert_stock(model, "gemma3", 1, **CALLS["sampling to the end"])
        assert total(counts(model), "accepted") > 0.5 * share * total(counts(model), "proposed")
        assert {name: id(p) for name, p in draft.named_parameters()} == before
    assert torch.equal(ask(fast), ask(build("gemma3")))


def test_counts_fit_each_other() -> None:
    model = speculating("llama", ("lookup", "model"))
    texts = [ask(model, 1, seed, suppress_tokens=FEW_TOKENS, max_new_tokens=20) for seed in range(4)]
    found = counts(model)
    assert found["calls"] == 4
    assert found["tokens"] == sum(ids.shape[1] - 6 - 1 for ids in texts)
    assert found["tokens"] == found["steps"] + total(found, "accepted")
    assert found["tokens_per_step"] == round(found["tokens"] / found["steps"], 3)
    assert set(found["proposed"]) == set(found["accepted"]) == {"lookup", "model"}
    assert all(0 < found["accepted"][name] <= found["proposed"][name] for name in found["proposed"])
    assert total(found, "proposed") <= 4 * found["steps"]
    assert found["near_ties"] == 0
    ask(model, 4)
    assert counts(model)["calls"] == 5
    assert f"{counts(model)['calls']} calls" in str(hf_accel.report(model))


def test_a_perfect_draft_is_always_accepted() -> None:
    model = build("llama")
    hf_accel.optimize(model, [*PLAIN, always("model", max_draft_tokens=6)], draft_model=build("llama"))
    for rows in (1, 4):
        for given in ({}, {"do_sample": True}):
            assert_stock(model, "llama", rows, max_new_tokens=16, **given)
    found = counts(model)
    assert total(found, "accepted") == total(found, "proposed") == 2 * 5 * 12
    assert found["steps"] == 4 * 3


def test_noisy_drafts_are_accepted_about_half_the_time() -> None:
    """What the other tests stand on: drafts that are right and wrong."""
    model = speculating("llama", "model")
    for seed in range(4):
        assert torch.equal(ask(model, 1, seed), ask(build("llama"), 1, seed))
    share = total(counts(model), "accepted") / total(counts(model), "proposed")
    assert 0.15 < share < 0.85
    assert noisy("llama") is not None


def test_lookup_is_judged_by_the_text_whether_it_was_verified_or_not() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
    text = Rows(ids, None, 100)
    belief = Acceptance([0.5] * 5)
    drafter = LookupDrafter(text, belief)
    guess = drafter.propose(4, lambda _: True)
    assert guess is not None
    assert guess.draft.tokens.tolist() == [[3, 4, 1, 2]]
    bucket = guess.buckets[0][0]
    text.add(0, [3, 4, 9])
    drafter.propose(4, lambda _: True)
    assert belief._tried[bucket] == pytest.approx(1 + DECAY + DECAY**2), "two right, one wrong"
    assert belief._accepted[bucket] == pytest.approx(DECAY + DECAY**2)
    text.ended[0] = True
    assert drafter.propose(4, lambda _: True) is None
