"""Whoever drafts, on whatever weights and cache, the text is that of the same model without speculation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from models import NAMES, build, padded, prompt

import hf_accel
from hf_accel import SpeculativeConfig, WeightOnlyConfig
from hf_accel.core.hosting import host_of
from hf_accel.decoding.verification import VerifiedSteps

EOS = [30, 31, 32, 33, 34]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2},
}
INPUTS = {
    "one row": {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())},
    "batch": padded([3, 11, 8, 5]),
}


def noisy(model: Any) -> Any:
    """Return a model that agrees with `model` on some tokens and not on others."""
    generator = torch.Generator().manual_seed(1)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.03 * noise * parameter.std())
    return draft


def draw(model: Any, inputs: Any, seed: int = 0, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text and the next random number after it."""
    torch.manual_seed(seed)
    return model.generate(**inputs, max_new_tokens=30, eos_token_id=EOS, **arguments), torch.rand(1)


def speculating(model: Any, drafter: Any, *others: Any, draft: Any = None, **fields: Any) -> Any:
    """Return the model, optimised so that it drafts at every step."""
    fields = {"bits": 8, "max_draft_tokens": 4, "adaptive": False} | fields
    return hf_accel.optimize(model, [SpeculativeConfig(drafter=drafter, **fields), *others], draft_model=draft)


def counts(model: Any) -> dict[str, Any]:
    """Return the counts of the report."""
    found: dict[str, Any] = hf_accel.report(model).to_dict()["speculation"]
    return found


@pytest.mark.parametrize("drafter", ["self", "model", ("lookup", "self")])
@pytest.mark.parametrize("name", NAMES)
def test_text_is_stocks(name: str, drafter: Any) -> None:
    stock = build(name)
    model = speculating(copy.deepcopy(stock), drafter, draft=noisy(stock))
    for arguments in WAYS.values():
        for inputs in INPUTS.values():
            (expected, after), (found, then) = draw(stock, inputs, **arguments), draw(model, inputs, **arguments)
            assert torch.equal(found, expected)
            assert after == then, "the random numbers stand elsewhere"
    if name != "phi3":  # its inputs are made by a method of its own, so it is decoded plainly
        assert counts(model)["calls"] == len(WAYS) * len(INPUTS)
        proposed, accepted = (sum(counts(model)[key].values()) for key in ("proposed", "accepted"))
        assert 0 < accepted < proposed, "drafts must be right sometimes and wrong sometimes"


@pytest.mark.parametrize("weights", [WeightOnlyConfig(bits=8), WeightOnlyConfig(bits=4, group_size=32)], ids=["8", "4"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_quantized_weights(name: str, weights: Any) -> None:
    model = build(name)
    speculating(model, ("lookup", "model"), weights, draft=noisy(build(name)))
    for arguments in WAYS.values():
        for inputs in INPUTS.values():
            expected, after = draw(model, inputs, speculative=False, **arguments)
            found, then = draw(model, inputs, **arguments)
            assert torch.equal(found, expected)
            assert after == then


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_are_skipped(name: str) -> None:
    stock = build(name)
    model = speculating(copy.deepcopy(stock), "layer_skip")
    for inputs in INPUTS.values():
        assert torch.equal(draw(model, inputs)[0], draw(stock, inputs)[0])
    assert "without 1 of its 3 layers" in str(hf_accel.report(model))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_far_past_the_window(name: str) -> None:
    stock = build(name)
    model = speculating(copy.deepcopy(stock), "self")
    for inputs in INPUTS.values():
        expected = stock.generate(**inputs, max_new_tokens=70)
        assert torch.equal(model.generate(**inputs, max_new_tokens=70), expected)


def test_every_row_is_the_row_alone() -> None:
    model = speculating(build("llama"), "self")
    together = model.generate(**INPUTS["batch"], max_new_tokens=25)
    for row in range(len(together)):
        valid = INPUTS["batch"]["attention_mask"][row].bool()
        ids = INPUTS["batch"]["input_ids"][row][valid][None]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25)
        assert torch.equal(alone[0, ids.shape[1] :], together[row, len(valid) :])


def test_the_governor_changes_no_text() -> None:
    stock = build("llama")
    model = speculating(copy.deepcopy(stock), "auto", adaptive=True, max_draft_tokens=8)
    for seed in range(4):
        for arguments in WAYS.values():
            for inputs in INPUTS.values():
                expected, found = (draw(m, inputs, seed, **arguments)[0] for m in (stock, model))
                assert torch.equal(found, expected)


def test_keywords_of_a_call() -> None:
    stock = build("llama")
    model = hf_accel.optimize(copy.deepcopy(stock), [hf_accel.DecodingConfig(), hf_accel.KVCacheConfig()])
    expected = draw(stock, INPUTS["one row"])[0]
    config = SpeculativeConfig(drafter="self", bits=8, adaptive=False)
    for value in (False, True, "lookup", ["lookup", "self"], config):
        assert torch.equal(draw(model, INPUTS["one row"], speculative=value)[0], expected)
    applied = hf_accel.report(model).applied
    assert applied[-1].config == config
    assert applied[-1].extra_bytes > 0
    assert sum(counts(model)["accepted"].values()) > 0


@pytest.mark.parametrize("bound", [0.0, 1e9])
def test_strict_text_is_plain_in_bfloat16(bound: float) -> None:
    model = speculating(build("llama").to(torch.bfloat16), "self", strict=True)
    speculation: Any = host_of(model).speculation
    speculation.rounding = tuple(max(own, bound) for own in speculation.rounding)  # 1e9: every choice is a near-tie
    for inputs in INPUTS.values():
        expected = draw(model, inputs, speculative=False)[0]
        assert torch.equal(draw(model, inputs)[0], expected)
    assert (counts(model)["near_ties"] > 0) >= (bound > 0)


def test_restore_and_copies() -> None:
    model = build("llama")
    before = fingerprint(model)
    logits = model(prompt()).logits
    speculating(model, "self")
    draw(model, INPUTS["one row"])
    twin = copy.deepcopy(model)
    hf_accel.restore(model)
    assert fingerprint(model) == before
    assert torch.equal(model(prompt()).logits, logits)
    assert torch.equal(draw(twin, INPUTS["one row"])[0], draw(model, INPUTS["one row"])[0])


def test_history_stays_with_its_tenant() -> None:
    model = speculating(build("llama"), "lookup", history_tokens=4096)
    first = draw(model, INPUTS["one row"], tenant="a")[0]
    seen = sum(counts(model)["accepted"].values())
    draw(model, INPUTS["one row"], tenant="b")
    other = sum(counts(model)["accepted"].values())
    assert torch.equal(draw(model, INPUTS["one row"], tenant="a")[0], first)
    again = sum(counts(model)["accepted"].values())
    assert other - seen == seen, "another tenant's text was drawn on"
    assert again - other > seen, "the tenant's own text was not"


def test_residual_sampling_draws_from_the_model() -> None:
    """The distribution of two tokens, by counting; a draft model that differs makes acceptance matter."""
    stock = build("llama")
    model = speculating(
        copy.deepcopy(stock), "model", draft=noisy(noisy(stock)), sampling="residual", max_draft_tokens=2
    )
    inputs = {"input_ids": prompt().expand(300, -1), "attention_mask": torch.ones(300, prompt().shape[1]).long()}
    arguments = {"do_sample": True, "top_k": 4, "max_new_tokens": 3}
    tables = []
    for number, each in enumerate((stock, stock, model)):
        torch.manual_seed(number)
        new = [each.generate(**inputs, **arguments)[:, -2:] for _ in range(4)]
        pairs = torch.cat(new) @ torch.tensor([[128], [1]])
        tables.append(torch.bincount(pairs[:, 0], minlength=128 * 128).double() / len(pairs))
    noise = float((tables[0] - tables[1]).abs().sum()) / 2
    assert float((tables[0] - tables[2]).abs().sum()) / 2 < 2 * noise
    assert sum(counts(model)["accepted"].values()) < sum(counts(model)["proposed"].values())


def test_a_draft_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = build("llama")
    model = speculating(copy.deepcopy(stock), "model", draft=noisy(stock))
    right = VerifiedSteps._matches

    def wrong(self: Any, draft: Any, chosen: Any) -> list[int]:
        found = right(self, draft, chosen)
        if draft is not None:  # the token that was chosen instead counts as accepted, and the next one with it
            found = [
                min(count + 1, most) if count >= 0 else count for count, most in zip(found, draft.counts, strict=True)
            ]
        return found

    monkeypatch.setattr(VerifiedSteps, "_matches", wrong)
    assert not torch.equal(draw(model, INPUTS["one row"])[0], draw(stock, INPUTS["one row"])[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_draft_tokens": 0}, "1 to 32"),
        ({"max_draft_tokens": True}, "1 to 32"),
        ({"drafter": "oracle"}, "lookup"),
        ({"drafter": []}, "lookup"),
        ({"drafter": ("self", "self")}, "once"),
        ({"strict": "yes"}, "True or False"),
        ({"sampling": "gumbel"}, "residual"),
        ({"bits": 3}, "4 or 8"),
        ({"history_tokens": -1}, "at least 0"),
    ],
)
def test_configs_that_do_not_exist(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(hf_accel.ConfigError, match=words):
        SpeculativeConfig(**fields)


def test_drafters_that_do_not_fit() -> None:
    model = build("llama")
    before = fingerprint(model)
    other = build("mistral")
    other.resize_token_embeddings(64)
    for draft, words in ((None, "draft_model"), (model, "itself"), (other, "vocabulary")):
        with pytest.raises(hf_accel.UnsupportedModelError, match=words):
            hf_accel.optimize(model, SpeculativeConfig(drafter="model"), draft_model=draft)
    with pytest.raises(hf_accel.UnsupportedModelError, match="layers"):
        hf_accel.optimize(build("mistral"), SpeculativeConfig(drafter="layer_skip"))
    with pytest.raises(hf_accel.UnsupportedModelError):
        hf_accel.optimize(model, [WeightOnlyConfig(bits=8), SpeculativeConfig(drafter="self")])
    assert fingerprint(model) == before


def test_keywords_that_contradict() -> None:
    stock = build("llama")
    model = speculating(copy.deepcopy(stock), "lookup")
    for arguments in (
        {"speculative": True, "assistant_model": stock},
        {"speculative": "lookup", "prompt_lookup_num_tokens": 3},
        {"speculative": 3},
        {"tenant": 3},
    ):
        with pytest.raises(hf_accel.ConfigError):
            draw(model, INPUTS["one row"], **arguments)
    assert torch.equal(draw(model, INPUTS["one row"])[0], draw(stock, INPUTS["one row"])[0])
    plain = hf_accel.optimize(build("llama"), [hf_accel.KVCacheConfig()])
    with pytest.raises(hf_accel.ConfigError, match="token loop"):
        draw(plain, INPUTS["one row"], speculative=True)
