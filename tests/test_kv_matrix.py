"""Speculation, codes, stores and strategies together: the text is that of the same cache without speculation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cached_calls import assert_moved, tight
from models import VOCABULARY, build, padded, prompt
from speculating import always, counts, noisy

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig, WeightOnlyConfig

NAME, NEW = "llama", 20
TOKENS = 48 + NEW
PLAIN = [DecodingConfig(), AttentionConfig(), KVCacheConfig()]
REPETITIVE = list(range(4, VOCABULARY))  # suppressed, so that lookup finds everything
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"suppress_tokens": REPETITIVE},
    "sampling": {"do_sample": True, "suppress_tokens": REPETITIVE, "top_k": 3},
    "beams": {"num_beams": 3, "suppress_tokens": REPETITIVE},
}
TIERED = "rows of a TieredLayer cannot have different lengths"


@functools.cache
def drafting(drafter: str, *configs: Any) -> Any:
    model = build(NAME)
    return hf_accel.optimize(model, [*PLAIN, *configs, always(drafter)], draft_model=noisy(NAME))


def text(model: Any, way: str, rows: int, **own: Any) -> Any:
    inputs = padded([48, 30, 41, 37]) if rows == 4 else {"input_ids": prompt(1, 48)}
    torch.manual_seed(2)
    given = {"max_new_tokens": NEW, "do_sample": False, **WAYS[way], **own}
    if rows == 1:
        given["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.generate(**inputs, **given), torch.rand(1).item()


def config_of(model: Any, bits: int | None, store: str, rows: int) -> KVCacheConfig:
    return KVCacheConfig(bits=bits) if store == "device" else tight(model, store, rows, TOKENS, bits)


# beams are never drafted for, whatever drafts
DRAFTED = [(drafter, way) for drafter in ("lookup", "self") for way in WAYS if (drafter, way) != ("self", "beams")]


@pytest.mark.parametrize("store", ["device", "cpu", "disk"])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("drafter, way", DRAFTED)
def test_every_combination(drafter: str, bits: int | None, store: str, way: str) -> None:
    model = drafting(drafter)
    for rows in (1, 4):
        config = config_of(model, bits, store, rows * (3 if way == "beams" else 1))
        expected, stands = text(model, way, rows, kv_cache=config, speculative=False)
        before = counts(model)
        found, stands_then = text(model, way, rows, kv_cache=config)
        assert torch.equal(found, expected)
        assert stands_then == stands
        after = counts(model)
        if store != "device":
            assert_moved(model, store)
        if way == "beams":
            continue
        if rows == 4 and store != "device":
            assert after["plain_calls"][TIERED] == before["plain_calls"].get(TIERED, 0) + 1
        else:
            assert after["calls"] == before["calls"] + 1
            assert sum(after["accepted"].values()) > sum(before["accepted"].values())


@pytest.mark.parametrize("store", ["device", "disk"])
@pytest.mark.parametrize("bits", [None, 8])
def test_with_weights_in_few_bits(bits: int | None, store: str) -> None:
    model = drafting("lookup", WeightOnlyConfig(bits=8))
    for way in ("greedy", "sampling"):
        config = config_of(model, bits, store, 1)
        expected = text(model, way, 1, kv_cache=config, speculative=False)
        found = text(model, way, 1, kv_cache=config)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
    assert sum(counts(model)["accepted"].values()) > 0


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_with_an_adapter() -> None:
    from test_wrappers import add_adapter

    stock = add_adapter(build(NAME), NAME)
    model = hf_accel.optimize(add_adapter(build(NAME), NAME), [*PLAIN, always("lookup")])
    inner = model.get_base_model()
    for rows in (1, 4):
        expected = text(stock, "greedy", rows)[0]
        for store in ("cpu", "disk"):
            for speculative in (True, False):
                own = {} if speculative else {"speculative": False}
                config = config_of(inner, None, store, rows)
                assert torch.equal(text(model, "greedy", rows, kv_cache=config, **own)[0], expected)
                assert_moved(inner, store)
        codes = config_of(inner, 8, "disk", rows)
        assert text(model, "greedy", rows, kv_cache=codes)[0].shape == expected.shape
    with model.disable_adapter(), stock.disable_adapter():
        config = config_of(inner, None, "disk", 1)
        assert torch.equal(text(model, "greedy", 1, kv_cache=config)[0], text(stock, "greedy", 1)[0])
