"""Rows that leave every kind of cache: what remains is what was there, to the bit, and texts are those of rows kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_calls import assert_moved, tight
from comparison import assert_equal_calls
from leaving_rows import CONFIGS, asking, fresh
from models import build, stock

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.cache.codec import Codec
from hf_accel.cache.eviction import METHODS
from hf_accel.cache.layers.evicting import EvictingLayer
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.cache.layers.tiered import TieredLayer
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.core.calls.cache_rows import keep_rows
from hf_accel.core.calls.present import Present

CPU = torch.device("cpu")


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [B, 2, T, 6] and values [B, 2, T, 4]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(batch, 2, tokens, 6, generator=generator), torch.randn(batch, 2, tokens, 4)
    return keys, values.copy_(keys[..., :4].flip(3))


def tiered(bits: int | None) -> TieredLayer:
    return TieredLayer(0, Tiers(CPU, store="cpu", near_budget_bytes=1 << 20), 4, Codec(bits))


LAYERS: dict[str, Any] = {
    "growing": lambda bits: GrowingLayer(codec=Codec(bits)),
    "sliding": lambda bits: GrowingSlidingLayer(5, codec=Codec(bits)),
    "tiered": tiered,
}
LEAVING = [{7}, {0}, {1, 4}, {0, 1, 2, 3, 4}, {0, 2, 4, 6, 7}, {0, 1, 2, 3, 4, 5, 6}]


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("gives_back", [False, True])
def test_what_remains_is_what_was_there(kind: str, bits: int | None, gives_back: bool) -> None:
    """Rows leave twice, with tokens between: keys and values are those of a layer that only ever had these rows."""
    for gone in LEAVING:
        layer, present = LAYERS[kind](bits), Present(8, CPU)
        texts = [states(8, tokens, seed) for seed, tokens in enumerate((9, 1, 1, 3))]
        layer.update(*texts[0])
        layer.update(*texts[1])
        for seed, leaves in ((2, gone), (3, gone | {5})):
            if leaves != set(range(8)):
                slots = present.slots_without(leaves)
                assert all(slot >= row for row, slot in enumerate(slots))
                keep_rows([layer], slots, CPU, gives_back=gives_back)
                present.leave(slots)
                assert set(present.order) == set(range(8)) - leaves
            layer.update(*(present.taken(part) for part in texts[seed]))
        expected = LAYERS[kind](bits)
        for text in texts:
            expected.update(*(present.taken(part) for part in text))
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
        assert layer.get_seq_length() == expected.get_seq_length() == 14


def test_rows_of_different_lengths_leave() -> None:
    layer, expected = GrowingLayer(), GrowingLayer()
    lengths, order = [6, 9, 7, 9], [3, 1]
    first, second = states(4, 9, 0), states(4, 2, 1)
    layer.update(*first)
    layer.set_rows(lengths)
    layer.keep_rows(order, gives_back=True)
    expected.update(*(part[order] for part in first))
    expected.set_rows([9, 9])
    for each in (layer, expected):
        each.update(*(part[order] for part in second))
    assert torch.equal(layer.keys, expected.keys)
    assert layer.buffers.rows is not None
    assert layer.buffers.rows.tolist() == [11, 11]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_evictions_go_on_as_with_rows_kept(method: str) -> None:
    more = {"window": 12, "sinks": 2} | ({} if method == "streaming" else {"kept_tokens": 18, "window": 6})
    cache = KVCacheConfig(eviction=method, **more)
    kept = hf_accel.optimize(build("llama"), [AttentionConfig(), cache, DecodingConfig(rows_leave=False)])
    found = fresh(configs=[AttentionConfig(), cache, DecodingConfig()])
    for samples in (False, True):
        assert_equal_calls(kept, found.model, asking(do_sample=samples, max_new_tokens=60))
    assert found.passes[-1] < found.passes[0]
    assert {len(layer) for layer in found.caches} == {1}


def test_layers_that_evict_forget_with_their_rows() -> None:
    layer = EvictingLayer(KVCacheConfig(eviction="h2o", kept_tokens=8, window=2), None)
    layer.update(*states(3, 5, 0))
    layer._received = torch.arange(30.0).view(3, 2, 5)
    layer._counts = [5, 4, 3]
    layer.keep_rows([2, 1], gives_back=False)
    assert layer._counts == [3, 4]
    assert layer._received[:, 0, 0].tolist() == [20, 10]
    assert layer._valid is not None
    assert layer._valid.shape == (2, 2, 5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_codes(bits: int, name: str) -> None:
    cache = KVCacheConfig(bits=bits)
    kept = hf_accel.optimize(build(name), [AttentionConfig(), cache, DecodingConfig(rows_leave=False)])
    found = fresh(name, [AttentionConfig(), cache, DecodingConfig()])
    assert_equal_calls(kept, found.model, asking())
    assert found.passes[-1] < found.passes[0]
    assert found.rows["bytes_freed"] > 0


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_tiers(store: str) -> None:
    """Blocks in memory are read where they lie while more than a third of their rows go on."""
    found = fresh()
    model, rows = found.model, [60, 55, 41, 60, 37, 33, 52, 58]
    call = asking(rows, max_new_tokens=60, kv_cache=tight(model, store, 8, 120))
    torch.testing.assert_close(call(model), asking(rows, max_new_tokens=60)(stock("llama")))
    assert_moved(model, store)
    assert found.passes[-1] <= 2
    assert any(3 <= rows < 8 for rows in found.passes) == (store == "disk")


def test_prefixes_that_are_taken_over_stay_what_they_were() -> None:
    """Rows move within buffers that took over keys and values: what is stored of them is stored elsewhere."""
    cache = KVCacheConfig(prefix_reuse=True)
    found = fresh(configs=[AttentionConfig(), cache, DecodingConfig()])
    rows = [90, 70, 86, 90, 20, 75, 88, 90]
    for _ in range(3):
        assert_equal_calls(stock("llama"), found.model, asking(rows))
        found.passes.clear()
    prefixes = hf_accel.report(found.model).to_dict()["kv_cache"]["prefixes"]
    assert prefixes["hits"] > 0
    assert found.rows["left"] > 10


def test_memory_is_given_back_where_half_of_it_is_empty() -> None:
    layer = GrowingLayer()
    layer.update(*states(8, 9, 0))
    layer.update(*states(8, 1, 1))
    before = layer.buffers.keys.untyped_storage().nbytes() + layer.buffers.values.untyped_storage().nbytes()
    assert layer.keep_rows([0, 1, 2, 7], gives_back=False) == 0
    assert layer.keep_rows([3, 1, 2], gives_back=True) == before - 3 * before // 8
    assert layer.buffers.keys.is_contiguous()


def test_tensors_that_were_assigned_are_left_alone() -> None:
    """They may be somebody's: rows that move are copied first."""
    keys, values = states(3, 5, 0)
    before, layer = keys.clone(), GrowingLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    layer.keep_rows([2, 1], gives_back=False)
    assert torch.equal(keys, before)
    assert layer.keys is not None
    assert torch.equal(layer.keys, before[[2, 1]])


def test_a_text_alone_goes_on_in_whole_steps() -> None:
    """The last row of a batch, unpadded, is decoded as a single text is: one native call per token."""
    configs: list[Any] = [hf_accel.DecoderBlockConfig(max_rows=16), *CONFIGS]
    found = fresh(configs=configs)
    call = asking([11, 11, 11, 11])
    assert_equal_calls(stock("llama"), found.model, call)
    assert found.passes[-1] == 1
