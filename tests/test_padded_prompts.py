"""Padded prompts that are read row by row: the text, logits and cache of stock, and what is handed on to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from models import build, padded

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.attention import padded_prompts
from hf_accel.core.drift import CACHE

LENGTHS = [9, 60, 21, 21]
CONFIGS = {
    "attention": [AttentionConfig()],
    "cache and loop": [AttentionConfig(), KVCacheConfig(), DecodingConfig()],
}


@pytest.fixture(autouse=True)
def _short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)


def make_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(padded_prompts, "LEAST_TOKENS", 32)
    patch.setattr(padded_prompts, "TOKENS_PER_GROUP", 1)


def count(model: Any) -> int:
    return hf_accel.report(model).attention_calls.padded_prompts  # type: ignore[union-attr,no-any-return]


@pytest.mark.parametrize("title", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt", "deepseek_v3", "mixtral"])
def test_text_logits_and_later_steps_are_stocks(name: str, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)
    stock = build(name)
    model = hf_accel.optimize(build(name), CONFIGS[title])
    asked = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}

    def call(m: Any) -> Any:
        out = m.generate(**padded(LENGTHS), **asked)
        return out.sequences, out.logits, out[CACHE].get_seq_length()

    assert_equal_calls(stock, model, call)
    assert count(model) == 1


def test_rows_are_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, whatever stands in the others."""
    make_short(monkeypatch)
    model = hf_accel.optimize(build("llama"), [AttentionConfig()])
    batch = padded(LENGTHS)
    asked = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    first = model.generate(**batch, **asked)
    alone = model.generate(batch["input_ids"][:1, -9:], attention_mask=torch.ones(1, 9, dtype=torch.long), **asked)
    assert torch.equal(first.logits[0][0], alone.logits[0][0])
    layer, own = first[CACHE].layers[1], alone[CACHE].layers[1]
    assert torch.equal(layer.keys[0, :, -9:], own.keys[0])
    assert torch.equal(layer.values[0, :, -9:], own.values[0])
    assert not layer.keys[0, :, :-9].any()
    assert count(model) == 1


def test_other_ways_of_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)
    stock, model = build("llama"), hf_accel.optimize(build("llama"), CONFIGS["cache and loop"])
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}):
        batch = padded([30]) if "prompt_lookup_num_tokens" in options else padded(LENGTHS)
        assert_equal_calls(stock, model, lambda m, b=batch, o=options: m.generate(**b, **o, max_new_tokens=8))
    assert count(model) == 2


def hooked(model: Any) -> dict[str, Any]:
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return {}


HANDED_ON = {
    "hidden states": lambda model: {"output_hidden_states": True, "return_dict_in_generate": True},
    "chunks": lambda model: {"prefill_chunk_size": 30},
    "no cache": lambda model: {"use_cache": False},
    "a cache of the caller's": lambda model: {CACHE: full(model)},
    "hooks": hooked,
}


def full(model: Any) -> Any:
    """A static cache, whose layers are filled by the pass itself."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=90)


@pytest.mark.parametrize("title", HANDED_ON)
def test_handed_on(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)
    stock, model = build("llama"), hf_accel.optimize(build("llama"), [AttentionConfig()])
    asked = HANDED_ON[title]
    assert_equal_calls(stock, model, lambda m: m.generate(**padded(LENGTHS), max_new_tokens=4, **asked(m))[0])
    assert count(model) == 0


def test_codes_are_read_by_the_pass_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)
    for bits, expected in ((8, 0), (None, 1)):
        model = hf_accel.optimize(build("llama"), [AttentionConfig(), KVCacheConfig(bits=bits)])
        model.generate(**padded(LENGTHS), max_new_tokens=2)
        assert count(model) == expected


MASKS = {
    "none": [12, 12, 12, 12],
    "too little": [56, 60, 58, 60],
    "one row": [60],
}


@pytest.mark.parametrize("title", MASKS)
def test_batches_that_gain_nothing_are_read_whole(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)
    model = hf_accel.optimize(build("llama"), [AttentionConfig()])
    model.generate(**padded(MASKS[title]), max_new_tokens=2)
    assert count(model) == 0


def test_holes_and_padding_on_the_right_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    make_short(monkeypatch)
    stock, model = build("llama"), hf_accel.optimize(build("llama"), [AttentionConfig()])
    batch = padded(LENGTHS)
    batch["attention_mask"][1, 20:30] = 0
    assert_equal_calls(stock, model, lambda m: m.generate(**batch, max_new_tokens=4))
    assert count(model) == 0
    assert_equal_calls(stock, copy.deepcopy(model), lambda m: m.generate(**padded(LENGTHS), max_new_tokens=4))
