"""Heads that are equal up to maps which leave the function alone lose nothing: the model of before is found again.

A model with few heads is given more, equal ones; each is turned its own way and they change places. What comes out is a
model whose weights look like any other's. Fewer heads of it have to compute what it computed, to rounding.
"""

from __future__ import annotations

from typing import Any

import gqa_twins as twins
import heads as tiny
import pytest
import torch
from gqa_twins import CASES, Case, distance, logits, rows
from models import SMALL, Tiny, padded, prompt

import hf_accel
from hf_accel.gqa import GQAConfig, maps
from hf_accel.gqa.conversion import reshaped_model
from hf_accel.gqa.converting import convert_into
from hf_accel.gqa.heads import attention_layers, read_heads
from hf_accel.gqa.maps import Freedom, found_maps
from hf_accel.gqa.running import Runnable, recorded

ROUNDING = 1e-5  # of the logits' norm in fp32; 4e-7 to 2e-6 were seen
IDS = rows(2, 40, seed=9)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def made_of(wide: Any, kv_heads: int) -> tuple[Any, list[Any]]:
    """Return a model with fewer heads in closed form, and what was made of each layer."""
    new = reshaped_model(wide, kv_heads, shares=True)
    made = convert_into(new, wide, GQAConfig(num_kv_heads=kv_heads, repair_steps=0), rows())
    return new, made


def partition(groups: Any) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


def expected_groups(places: list[int], queries: int, own: int) -> set[frozenset[int]]:
    """Return the query heads that read one key head of the original, as they are numbered in its twin."""
    each, times = queries // len(places), len(places) // own
    sources = [places[head // each] // times for head in range(queries)]
    return {frozenset(h for h in range(queries) if sources[h] == source) for source in range(own)}


def check(model: Any, case: Case, kv_heads: int) -> None:
    """Check that the twin of `model` with `kv_heads` comes back to the heads that `model` has."""
    own, expected = attention_layers(model)[0].kv_heads, logits(model, IDS)
    wide, places = twins.twin(model, case, kv_heads)
    assert distance(logits(wide, IDS), expected) < ROUNDING, "the twin computes something else"
    pooled = hf_accel.convert_gqa(wide, own, method="mean")
    assert distance(logits(pooled, IDS), expected) > 0.3, "the twin's heads are alike as they stand"
    new, made = made_of(wide, own)
    assert distance(logits(new, IDS), expected) < ROUNDING
    layers = attention_layers(wide)
    for layer, each, old in zip(layers, made, places, strict=True):
        assert partition(each.groups) == expected_groups(old, layer.heads, own), layer.path
        assert each.errors.before < ROUNDING
        assert each.errors.after == each.errors.before


@pytest.mark.parametrize("title", CASES)
def test_equal_heads_are_found_and_lose_nothing(title: str) -> None:
    case = CASES[title]
    check(twins.original(case), case, case.more)


LARGER: dict[str, tuple[dict[str, Any], int]] = {
    "fewer of few": ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4),
    "one of few": ({"num_attention_heads": 8, "num_key_value_heads": 1}, 4),
    "one of all": ({"num_attention_heads": 8, "num_key_value_heads": 1}, 8),
    "pairs of twelve": ({"num_attention_heads": 12, "num_key_value_heads": 6}, 12),
    "threes of twelve": ({"num_attention_heads": 12, "num_key_value_heads": 4}, 12),
}


@pytest.mark.parametrize("title", LARGER)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_other_ratios(architecture: str, title: str) -> None:
    values, more = LARGER[title]
    model = tiny.model_of(Tiny(architecture, SMALL | values | {"head_dim": 8, "num_hidden_layers": 1}, 0.35))
    check(model, Case("", normed="rms" if architecture == "qwen3" else ""), more)


@pytest.mark.parametrize("title", ["llama", "qwen3", "falcon", "gpt2 as gpt_bigcode"])
def test_the_text_is_that_of_the_original(title: str) -> None:
    case = CASES[title]
    model = twins.original(case)
    wide, _ = twins.twin(model, case, case.more, seed=1)
    few = hf_accel.convert_gqa(wide, attention_layers(model)[0].kv_heads, calibration=rows(), repair_steps=2)
    batch = padded([11, 5])
    assert torch.equal(few.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_the_models_own_text_will_do() -> None:
    case = CASES["llama"]
    model = tiny.model_of(Tiny("llama", SMALL | {"num_hidden_layers": 1, "max_position_embeddings": 33}))
    wide, _ = twins.twin(model, case, 4)
    few = hf_accel.convert_gqa(wide, 2, repair_steps=0)
    ids = IDS[:, :33]
    assert distance(logits(few, ids), logits(model, ids)) < ROUNDING


def test_double_precision() -> None:
    model = tiny.made("llama").double()
    wide, _ = twins.twin(model, CASES["llama"], 4)
    few = hf_accel.convert_gqa(wide, 2, calibration=rows(), repair_steps=0)
    assert distance(logits(few, IDS), logits(model, IDS)) < 1e-9


def test_half_precision() -> None:
    """The twin itself is rounded: fewer heads are as far from it as it is from the model it was made of."""
    model = tiny.made("llama")
    wide, _ = twins.twin(model, CASES["llama"], 4)
    wide = wide.to(torch.bfloat16)
    few = hf_accel.convert_gqa(wide, 2, calibration=rows(), repair_steps=0)
    assert {parameter.dtype for parameter in few.parameters()} == {torch.bfloat16}
    rounded = distance(logits(wide, IDS), logits(model, IDS))
    assert distance(logits(few, IDS), logits(model, IDS)) < 1.5 * rounded < 0.1


FOUND: dict[str, tuple[Freedom, int, int, str]] = {
    "llama": (Freedom.ANY, 5, 0, "halves"),
    "mistral": (Freedom.ANY, 8, 0, "halves"),
    "qwen2": (Freedom.ANY, 6, 0, "halves"),
    "qwen3": (Freedom.SIGNS, 8, 0, "halves"),
    "gemma2": (Freedom.ANY, 8, 0, "halves"),
    "gemma3": (Freedom.SIGNS, 8, 0, "halves"),
    "phi3": (Freedom.ANY, 6, 0, "halves"),
    "mixtral": (Freedom.ANY, 6, 0, "halves"),
    "qwen3_moe": (Freedom.SIGNS, 8, 0, "halves"),
    "stablelm": (Freedom.ANY, 3, 6, "halves"),
    "phi": (Freedom.NONE, 0, 16, ""),
    "starcoder2": (Freedom.ANY, 6, 0, "halves"),
    "cohere": (Freedom.ANY, 6, 0, "neighbours"),
    "falcon_grouped": (Freedom.ANY, 6, 0, "halves"),
    "gpt2": (Freedom.ANY, 0, 12, ""),
    "opt": (Freedom.ANY, 0, 12, ""),
    "gpt_neox": (Freedom.ANY, 2, 8, "halves"),
    "gptj": (Freedom.ANY, 4, 4, "neighbours"),
    "bigcode": (Freedom.ANY, 0, 12, ""),
    "gpt_oss": (Freedom.ANY, 8, 0, "halves"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_keys_may_be_turned_by(name: str) -> None:
    freedom, pairs, free, order = FOUND[name]
    model = tiny.made(name)
    layers = attention_layers(model)
    read = recorded(model, layers, prompt(4, 24), 4)
    for layer in layers:
        runnable = Runnable(layer, model.config)
        found = found_maps(runnable, read[layer.path].call, runnable.heads(), model.config)
        assert found.freedom is freedom
        assert (len(found.pairs), len(found.free)) == (pairs, free)
        first = [[j, j + pairs] if order == "halves" else [2 * j, 2 * j + 1] for j in range(pairs)]
        assert found.pairs.tolist() == first
        assert found.free.tolist() == list(range(2 * pairs, 2 * pairs + free))


def test_equal_norm_weights_let_pairs_turn() -> None:
    model = tiny.made("qwen3")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_norm.weight" in name:
                parameter.fill_(1)
    layer = attention_layers(model)[0]
    call = recorded(model, [layer], prompt(4, 24), 4)[layer.path].call
    runnable = Runnable(layer, model.config)
    assert found_maps(runnable, call, runnable.heads(), model.config).freedom is Freedom.TURNS


@pytest.mark.parametrize("freedom", list(Freedom), ids=lambda freedom: freedom.name)
def test_keys_turned_for_trial_are_what_the_twin_here_allows(freedom: Freedom) -> None:
    """The maps tried differ from doing nothing, but for none, and scores of all pairs stay as they were."""
    heads = read_heads(attention_layers(tiny.made("llama"))[0], tiny.made("llama").config)
    numbers = torch.arange(10)
    found = maps._mapped(heads, maps.KeyMaps(torch.stack([numbers[:3], numbers[3:6]], 1), numbers[6:], freedom))
    assert torch.equal(found.k, heads.k) == (freedom is Freedom.NONE)
    scores, now = (each.q.mT @ each.k.repeat_interleave(2, 0) for each in (heads, found))  # [heads, E, E]
    torch.testing.assert_close(now, scores, rtol=1e-4, atol=1e-4)
