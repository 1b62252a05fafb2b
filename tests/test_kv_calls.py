"""Every kind of call gives the same text wherever blocks of the cache lie, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_calls import (
    ONLY_WINDOWS,
    STORES,
    WITHOUT_TIERS,
    assert_moved,
    assert_near,
    in_lists,
    shared,
    stock,
    tight,
)
from comparison import assert_same_outcome, run
from models import NAMES, build, padded, prompt
from texts import tokenizer
from transformers import DynamicCache

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig, UnsupportedModelError
from hf_accel.core.drift import CACHE

NEW = 8
ONE, SEVERAL = prompt(1, 66), padded([66, 40, 49, 57])
WIDE, HARD = ("llama", "gemma3"), ("padded", "continued by other rows")
MOVABLE = [name for name in NAMES if name not in WITHOUT_TIERS]
BITS = [None, 8, 4]


def ask(model: Any, inputs: Any = None, **given: Any) -> Any:
    inputs = {"input_ids": ONE, "attention_mask": torch.ones_like(ONE)} if inputs is None else inputs
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **given})


def continued(model: Any, **own: Any) -> Any:
    """Return what a second call makes of the cache that the first one returned."""
    first = ask(model, return_dict_in_generate=True, **own)
    ids = torch.cat([first.sequences, prompt(1, 9, seed=8)], dim=1)
    found = model.generate(ids, cache=first[CACHE], max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert found[CACHE] is first[CACHE]
    return found.sequences, [int(found[CACHE].get_seq_length()), found[CACHE].get_mask_sizes(5, 0)]


def continued_by_other_rows(model: Any, **own: Any) -> Any:
    """Return what a second call makes of some rows of the cache that the first one returned, in another order."""
    first = ask(model, SEVERAL, return_dict_in_generate=True, **own)
    rows = torch.tensor([2, 0, 3])
    first[CACHE].batch_select_indices(rows)
    ids = torch.cat([first.sequences[rows], prompt(3, 3, seed=8)], dim=1)
    mask = torch.cat([SEVERAL["attention_mask"][rows], torch.ones(3, NEW + 3, dtype=torch.long)], dim=1)
    given = {"cache": first[CACHE], "max_new_tokens": NEW, "do_sample": False}
    return model.generate(ids, attention_mask=mask, **given)


SHORT = [{"input_ids": prompt(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}, padded([6, 4])]
LONG = {"max_new_tokens": 36}
# rows, and the call
CALLS: dict[str, tuple[int, Any]] = {
    "greedy": (1, ask),
    "sampling": (1, lambda model, **own: ask(model, do_sample=True, temperature=0.9, top_k=40, **own)),
    # long texts after short prompts, so that what beams have chosen moves out, too
    "beams": (4, lambda model, **own: ask(model, SHORT[0], num_beams=4, num_return_sequences=2, **LONG, **own)),
    "beams that sample": (8, lambda model, **own: ask(model, SHORT[1], num_beams=4, do_sample=True, **LONG, **own)),
    "sequences": (3, lambda model, **own: ask(model, num_return_sequences=3, do_sample=True, **own)),
    "padded": (4, lambda model, **own: ask(model, SEVERAL, **own)),
    "chunks": (4, lambda model, **own: ask(model, SEVERAL, prefill_chunk_size=23, **own)),
    "continued": (1, continued),
    "continued by other rows": (4, continued_by_other_rows),
}


def outcome(title: str, model: Any, **own: Any) -> Any:
    found = run(lambda model: CALLS[title][1](model, **own), model)
    if found.error is not None:
        raise AssertionError(f"{title}: {own}") from found.error
    return found


# all calls where paths differ, elsewhere those in which most can go wrong
PAIRS = [(name, title) for name in MOVABLE for title in CALLS if name in WIDE or title in HARD]


@pytest.mark.parametrize("name, title", PAIRS)
def test_every_call_in_every_store(name: str, title: str) -> None:
    model, rows = shared(name), CALLS[title][0]
    tokens = ONE.shape[1] + NEW
    for bits in BITS:
        if bits is None:
            expected = outcome(title, stock(name))
        else:
            with in_lists():
                expected = outcome(title, model, kv_cache=tight(model, "cpu", rows, tokens, bits))
        for store in STORES:
            found = outcome(title, model, kv_cache=tight(model, store, rows, tokens, bits))
            assert_same_outcome(expected, found)
            if name != ONLY_WINDOWS:
                assert_moved(model, store)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MOVABLE)
def test_what_is_kept_elsewhere_is_what_the_device_would_hold(name: str, bits: int | None) -> None:
    model, given = shared(name), {"return_dict_in_generate": True, "output_logits": True}
    expected = ask(model, SEVERAL, kv_cache=KVCacheConfig(bits=bits), **given)
    for store in STORES:
        config = tight(model, store, 4, ONE.shape[1] + NEW, bits)
        assert_near(expected, ask(model, SEVERAL, kv_cache=config, **given), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["llama", "gemma3", *WITHOUT_TIERS])
def test_rows_of_a_padded_batch_are_rows_alone(name: str, bits: int | None) -> None:
    """Of every row the logits of every step; in two passes each, one over the prompt and one over a step."""
    model, given = shared(name), {"return_dict_in_generate": True, "output_logits": True}
    stores = ("device",) if name in WITHOUT_TIERS else ("device", "disk")
    for store in stores:
        found = []
        for rows, inputs in [(4, SEVERAL)] + [(1, {k: v[b : b + 1] for k, v in SEVERAL.items()}) for b in range(4)]:
            if rows == 1:
                inputs = {key: tensor[:, -int(inputs["attention_mask"].sum()) :] for key, tensor in inputs.items()}
            config = KVCacheConfig(bits=bits)
            if store != "device":
                config = tight(model, store, rows, ONE.shape[1] + NEW, bits)
            found.append(ask(model, inputs, kv_cache=config, **given))
        for row, alone in enumerate(found[1:]):
            here = type(alone)(
                sequences=found[0].sequences[row : row + 1], logits=tuple(x[row : row + 1] for x in found[0].logits)
            )
            padding = here.sequences.shape[1] - alone.sequences.shape[1]
            here.sequences = here.sequences[:, padding:]
            assert_near(here, alone, bits)


@pytest.mark.parametrize("store", ["device", *STORES])
@pytest.mark.parametrize("bits", BITS)
def test_as_a_plan_twice(bits: int | None, store: str) -> None:
    model = shared("llama")
    config = KVCacheConfig(bits=bits) if store == "device" else tight(model, store, 4, ONE.shape[1] + NEW, bits)
    expected = ask(model, SEVERAL, kv_cache=config)
    planned = hf_accel.optimize(build("llama"), [DecodingConfig(), AttentionConfig(), config])
    for _ in range(2):
        assert torch.equal(ask(planned, SEVERAL), expected)
    found = hf_accel.report(planned).to_dict()
    if config != KVCacheConfig():
        assert list(found["kv_cache"]["caches"].values()) == [2]
    assert found["calls"]["served"] == 2
    if store != "device":
        assert_moved(planned, store)


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_streamers_and_stop_strings(name: str, store: str) -> None:
    model = shared(name)
    config = tight(model, store, 1, ONE.shape[1] + NEW)
    whole = ask(stock(name))
    stop = tokenizer().decode(whole[0, 70:72])
    listeners = Listener(), Listener()
    expected = ask(stock(name), streamer=listeners[0], stop_strings=[stop], tokenizer=tokenizer())
    given = {"stop_strings": [stop], "tokenizer": tokenizer()}
    assert torch.equal(ask(model, kv_cache=config, streamer=listeners[1], **given), expected)
    assert expected.shape[1] < whole.shape[1]
    assert listeners[0].heard == listeners[1].heard
    assert listeners[1].heard[-1] == "end"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", WITHOUT_TIERS)
def test_attention_that_needs_tensors(name: str, bits: int | None) -> None:
    """Codes work and are decoded for it; stores are refused before anything runs."""
    model = shared(name)
    expected = ask(model, kv_cache=KVCacheConfig(bits=bits), return_dict_in_generate=True, output_logits=True)
    reference = ask(stock(name), return_dict_in_generate=True, output_logits=True)
    first = reference.logits[0]
    assert (expected.logits[0] - first).norm() <= {None: 1e-4, 8: 0.05, 4: 0.5}[bits] * first.norm()
    for title in ("beams", "sequences", "padded", "chunks", "continued", "continued by other rows"):
        if bits is None:
            assert_same_outcome(outcome(title, stock(name)), outcome(title, model))
        else:
            outcome(title, model, kv_cache=KVCacheConfig(bits=bits))
    for store in STORES:
        with pytest.raises(UnsupportedModelError, match=WITHOUT_TIERS[name]):
            hf_accel.optimize(build(name), [KVCacheConfig(bits=bits, store=store)])
        with pytest.raises(UnsupportedModelError, match=WITHOUT_TIERS[name]):
            ask(model, kv_cache=KVCacheConfig(bits=bits, store=store))
    assert torch.equal(ask(model, kv_cache=KVCacheConfig(bits=bits)), expected.sequences)


@pytest.mark.parametrize("name", NAMES)
def test_bits_change_little_and_something(name: str) -> None:
    """Codes are really used, and are near what they stand for."""
    given = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    reference = ask(stock(name), **given).logits[0]
    for bits, bound in ((8, 0.05), (4, 0.6)):
        off = (ask(shared(name), kv_cache=KVCacheConfig(bits=bits), **given).logits[0] - reference).norm()
        assert 1e-5 * reference.norm() < off <= bound * reference.norm(), (bits, float(off / reference.norm()))


def test_a_returned_cache_is_a_dynamic_cache() -> None:
    model = shared("llama")
    expected = ask(stock("llama"), return_dict_in_generate=True)[CACHE]
    for store in STORES:
        found = ask(model, kv_cache=tight(model, store, 1, 78), return_dict_in_generate=True)[CACHE]
        assert type(found) is DynamicCache
        assert found.get_seq_length() == expected.get_seq_length()
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert (ours.keys - theirs.keys).abs().max() < 1e-4
            assert (ours.values - theirs.values).abs().max() < 1e-4
