"""Calls with configs of their own, as many as may come, leave a bounded amount behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_calls import smallest, stock
from models import build, prompt

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.cache import patcher
from hf_accel.cache.assembly import CacheAssembly
from hf_accel.cache.prefix.store import PrefixStore
from hf_accel.cache.statistics import MOST_REASONS, CacheStatistics
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.recent import Recent

BLOCK = 64 * 3 * 2 * 2 * 10 * 4  # tokens, layers, keys and values, heads, head size, bytes
MOST, ROUNDS = 3, 9


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(patcher, "MOST_CONFIGS", MOST)
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), KVCacheConfig()])
    yield model
    hf_accel.restore(model)


def ask(model: Any, seed: int = 0, tokens: int = 150, **given: Any) -> Any:
    return model.generate(prompt(1, tokens, seed), max_new_tokens=2, do_sample=False, **given)


def held(model: Any) -> int:
    """Return the entries of everything that the calls left with the model."""
    host: Any = host_of(model)
    report = host.report
    own = [host.built, *(entry for entry in host.built.values() if hasattr(entry, "__len__"))]
    own += [report.applied, host.journal, host.calls.reasons, report.kv_cache.caches, report.kv_cache.not_done]
    return sum(len(entry) for entry in own)


def alive() -> tuple[int, int]:
    """Return how many configs are at work and how many stores there are, of all models."""
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return sum(kind is CacheAssembly for kind in kinds), sum(kind is PrefixStore for kind in kinds)


def configs(model: Any, folder: Path) -> dict[str, Any]:
    """Return for each number that a config may hold how to make configs that differ in it alone."""
    least = smallest(model, 1, 152)
    return {
        "device_budget_bytes": lambda n: KVCacheConfig(store="disk", device_budget_bytes=least + n),
        "cpu_budget_bytes": lambda n: KVCacheConfig(store="cpu", cpu_budget_bytes=least + 10**6 + n),
        "from_tokens": lambda n: KVCacheConfig(bits=8, from_tokens=1000 + n),
        "kept_tokens": lambda n: KVCacheConfig(eviction="snapkv", kept_tokens=64 + n),
        "window": lambda n: KVCacheConfig(window=32 + n),
        "prefix_budget_bytes": lambda n: KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=4 * BLOCK + n),
        "prefix_folder": lambda n: KVCacheConfig(prefix_reuse=True, prefix_folder=str(folder / str(n))),
    }


NAMES = ["device_budget_bytes", "cpu_budget_bytes", "from_tokens", "kept_tokens", "window", "prefix_budget_bytes"]


@pytest.mark.parametrize("name", [*NAMES, "prefix_folder"])
def test_configs_of_any_number(name: str, model: Any, tmp_path: Path) -> None:
    make = configs(model, tmp_path)[name]
    before = alive()
    sizes = []
    for number in range(ROUNDS):
        ask(model, tokens=70, kv_cache=make(number))
        sizes.append(held(model))
    reasons = ROUNDS - MOST - 1 if name == "from_tokens" else 0  # they name the number, and have a bound of their own
    assert sizes[-1] - sizes[MOST] == reasons
    made = [now - then for now, then in zip(alive(), before)]
    assert made[0] <= MOST
    assert made[1] <= (MOST if name == "prefix_folder" else 1)


def test_prefixes_of_any_number_of_budgets_take_the_memory_of_one(model: Any) -> None:
    """The budget is that of the call; what other calls stored is found."""
    for number in range(ROUNDS):
        budget = BLOCK * (2 + number % 7) + number
        chosen = KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=budget)
        for seed in (number, number, number + 1):
            assert torch.equal(ask(model, seed, kv_cache=chosen), ask(stock("llama"), seed))
        assert hf_accel.report(model).kv_cache.prefixes()["bytes"] <= budget
        assert hf_accel.report(model).kv_cache.prefixes()["hits"] >= number + 1
    larger = KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=8 * BLOCK)
    ask(model, 500, kv_cache=larger)
    before = hf_accel.report(model).kv_cache.prefixes()["hits"]
    ask(model, 500, kv_cache=KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=9 * BLOCK))
    assert hf_accel.report(model).kv_cache.prefixes()["hits"] == before + 1
    ask(model, 501, kv_cache=KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=1))
    assert hf_accel.report(model).kv_cache.prefixes()["bytes"] == 0


def test_the_budget_of_the_model_comes_back_after_a_call_with_another() -> None:
    chosen = [DecodingConfig(), AttentionConfig(), KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=6 * BLOCK)]
    with hf_accel.optimized(build("llama"), chosen) as model:
        for seed in range(3):
            ask(model, seed)
        counts = hf_accel.report(model).kv_cache.prefixes
        assert counts()["bytes"] == 6 * BLOCK
        ask(model, 9, kv_cache=KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=2 * BLOCK))
        assert counts()["bytes"] <= 2 * BLOCK
        for seed in range(3):
            assert torch.equal(ask(model, seed), ask(stock("llama"), seed))
        assert counts()["bytes"] == 6 * BLOCK


def test_what_is_dropped_while_a_call_uses_it(model: Any) -> None:
    """A call goes on with what it began with, and its blocks are found again as long as one config is kept."""
    first = KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=8 * BLOCK)

    class Others:
        def put(self, value: Any) -> None:
            for number in range(ROUNDS):
                ask(model, tokens=9, kv_cache=KVCacheConfig(window=8 + number))

        def end(self) -> None:
            pass

    assert torch.equal(ask(model, 3, kv_cache=first, streamer=Others()), ask(stock("llama"), 3))
    assert torch.equal(ask(model, 3, kv_cache=first), ask(stock("llama"), 3))


def test_reasons_have_a_bound() -> None:
    statistics = CacheStatistics()
    for number in range(1000):
        statistics.skipped(f"below {number} tokens")
    statistics.skipped("below 3 tokens")
    assert len(statistics.not_done) == MOST_REASONS + 1
    assert statistics.not_done["below 3 tokens"] == 2
    assert sum(statistics.not_done.values()) == 1001


def test_recent() -> None:
    recent: Recent[int, str] = Recent(2)
    recent.put(1, "a")
    recent.put(2, "b")
    assert recent.get(1) == "a"
    recent.put(3, "c")
    assert (recent.get(1), recent.get(2), recent.get(3), len(recent)) == ("a", None, "c", 2)
    recent.put(1, "d")
    recent.put(4, "e")
    assert (recent.get(1), recent.get(3), recent.get(4)) == ("d", None, "e")
