"""The text on which quality is measured, and the measure against a textbook twin."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import FEW, NAMES, VOCABULARY, build, prompt
from texts import tokenizer

import hf_accel
from hf_accel import ConfigError, WeightOnlyConfig
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.measure.text import ROWS, TOKENS, calibration_text


def test_given_ids() -> None:
    model, ids = build("llama"), prompt(3, 9)
    for given in (ids, ids.tolist(), {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        text = calibration_text(model, given)
        assert torch.equal(text.ids, ids)
        assert not text.is_own
    assert torch.equal(calibration_text(model, ids[0]).ids, ids[:1])
    assert calibration_text(model, tokenizer()("abacad", return_tensors="pt")).ids.shape == (1, 3)
    assert calibration_text(model, prompt(1, 700)).ids.shape == (1, 512), "cut to the model's context"


def test_given_strings_are_joined_and_cut_into_rows() -> None:
    words = tokenizer()
    found = calibration_text(build("llama"), ["abac" * 100, "adae" * 100], words)
    joined = words("abac" * 100 + "adae" * 100)["input_ids"]
    assert found.ids.flatten().tolist() == joined[: found.ids.numel()]
    assert found.ids.shape == (1, 256)
    assert torch.equal(
        calibration_text(build("llama"), "abac", words).ids, calibration_text(build("llama"), ["abac"], words).ids
    )


@pytest.mark.parametrize(
    "given, words",
    [
        ("some text", "give the tokenizer"),
        (["some", "text"], "give the tokenizer"),
        ([], "has 0 tokens in 0 texts"),
        ([[]], "has 0 tokens in 1 texts"),
        pytest.param(iter(()), "has 0 tokens", id="an iterator that is empty"),
        (torch.zeros(0, 8, dtype=torch.long), "has 0 tokens"),
        (torch.zeros(2, 1, dtype=torch.long), "a row has two or more"),
        ([[4], []], "has 1 tokens in 2"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}, "has 0 tokens"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}, "another shape"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"token ids \[B, T\].*shape \(1, 2, 3\)"),
        (torch.full((2, 8), 0.5), "token ids"),
        ([[1, 2, 3], ["b"]], "token ids"),
        ([[1, 2], None], "token ids"),
        ([True, False], "token ids"),
        pytest.param(object(), "a data set, or an iterable of them; object", id="object"),
        (7, "a data set, or an iterable of them; int"),
        ({"attention_mask": torch.ones(1, 4)}, "the columns attention_mask; one of input_ids, text, messages"),
        ({"train": [], "test": []}, "the columns train, test.*several splits give one"),
        ([{"text": 3}], "a int in its column 'text'"),
        ({"text": [3, "a"]}, "a int in its column 'text'"),
        ({"messages": ["a"]}, "a str in its column 'messages'"),
        ([{"role": "user", "content": "abac"}], "as messages; give the tokenizer"),
        (torch.full((1, 4), VOCABULARY), "vocabulary of 128: 128"),
        (torch.full((1, 4), -1), "vocabulary of 128: -1"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibration_text(build("llama"), given)


def test_text_without_a_token_is_refused() -> None:
    for given in ("", ["", ""], "ab"):
        with pytest.raises(ConfigError, match="a row has two or more"):
            calibration_text(build("llama"), given, tokenizer())


@pytest.mark.parametrize("name", NAMES)
def test_own_text_is_the_same_every_time(name: str) -> None:
    model = build(name)
    before, random = fingerprint(model), torch.get_rng_state()
    text = calibration_text(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not changes(before, fingerprint(model))
    torch.rand(3)
    assert torch.equal(calibration_text(model).ids, text.ids)
    assert text.ids.shape == (ROWS, TOKENS + 1)
    assert text.is_own
    assert len(text.ids[:, 1:].unique(dim=0)) == ROWS, "samples, not one text"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["abc"]},
        {"max_time": 1e-3},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"eos_token_id": list(range(2, VOCABULARY))},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_own_text_does_not_heed_generation_settings(settings: dict[str, Any]) -> None:
    model = build("llama")
    expected = calibration_text(model).ids
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    before = fingerprint(model)
    assert torch.equal(calibration_text(model).ids, expected)
    assert not changes(before, fingerprint(model))


def textbook(original: Any, changed: Any, ids: torch.Tensor) -> dict[str, float]:
    """Sums over tokens one by one, in double precision."""
    kl = equal = before = after = 0.0
    count = 0
    for row in ids:
        with torch.no_grad():
            one, two = (model(row[None]).logits[0].double().softmax(-1) for model in (original, changed))
        for position in range(len(row) - 1):
            p, q = one[position].tolist(), two[position].tolist()
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
            equal += p.index(max(p)) == q.index(max(q))
            before -= math.log(p[int(row[position + 1])])
            after -= math.log(q[int(row[position + 1])])
            count += 1
    return {
        "kl": kl / count,
        "top1_agreement": equal / count,
        "perplexity_before": math.exp(before / count),
        "perplexity_after": math.exp(after / count),
        "tokens": count,
    }


@pytest.mark.parametrize("name", FEW)
def test_quality_is_what_the_textbook_says(name: str) -> None:
    original, model, ids = build(name), build(name), prompt(2, 12)
    reference = QualityReference(model, CalibrationText(ids, "a test", False))
    hf_accel.optimize(model, WeightOnlyConfig(bits=4, head=4))
    found = reference.compare()
    for key, value in textbook(original, model, ids).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-3), key
    assert found.kl > 1e-4
    assert found.source == "a test"
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "perplexity" in str(found)


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_model_costs_nothing(name: str) -> None:
    model = build(name)
    found = QualityReference(model, calibration_text(model)).compare()
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.tokens == ROWS * TOKENS
    assert found.perplexity_before is None, "of its own text a model's perplexity says nothing"
    assert "perplexity" not in str(found)


def test_impossible_tokens_are_compared() -> None:
    """A model that gives some tokens no probability at all: 0 log 0 is 0, and what was possible must stay so."""
    model = build("llama")
    forward, shift = type(model.lm_head).forward, {"token": 5}

    def forbidding(x: torch.Tensor) -> torch.Tensor:
        logits = forward(model.lm_head, x).clone()
        logits[..., shift["token"]] = -math.inf
        return logits

    model.lm_head.forward = forbidding
    reference = QualityReference(model, CalibrationText(prompt(1, 8), "a test", True))
    assert reference.compare().kl == 0
    shift["token"] = 6
    assert reference.compare().kl == math.inf


def test_long_text_is_cut_to_what_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.measure.quality._KEPT_BYTES", 4 * VOCABULARY * 10 * 2)
    found = QualityReference(build("llama"), CalibrationText(prompt(5, 11), "a test", False)).compare()
    assert found.tokens == 20
