"""Calls of `generate` over caches whose blocks of 16 tokens really move out, and what their outcome must be."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import build

import hf_accel
from hf_accel import AttentionConfig, ConfigError, DecodingConfig, KVCacheConfig
from hf_accel.cache import assembly as caching
from hf_accel.cache.codec import Codec
from hf_accel.cache.division import divide
from hf_accel.cache.patcher import _shapes
from hf_accel.core.calls.hosting import host_of

CPU = torch.device("cpu")
STORES = ("cpu", "disk")
WITHOUT_TIERS = {"deepseek_v3": "asks for all keys and values"}
ONLY_WINDOWS = "mistral"  # of which nothing is ever moved
# what a code that rounding turned may change in logits, by their norm
TOLERANCE = {None: 1e-4, 8: 0.03, 4: 0.3}


class PlainTiers:
    """What tiers promise, in a dozen lines: lists of copies that stay where they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.blocks: dict[int, list[Any]] = {}
        self.peak_bytes: dict[str, int] = {}
        self.notes: list[str] = []

    def count(self, layer: int) -> int:
        return len(self.blocks.get(layer, []))

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.blocks.setdefault(layer, []).append((keys.clone(), values.clone()))

    def pop(self, layer: int) -> Any:
        return self.blocks[layer].pop()

    def read(self, layer: int) -> Iterator[Any]:
        yield from self.blocks.get(layer, [])

    def select(self, layer: int, rows: torch.Tensor) -> None:
        self.blocks[layer] = [(keys[rows], values[rows]) for keys, values in self.blocks.get(layer, [])]

    def drop(self, layer: int) -> None:
        self.blocks.pop(layer, None)


@contextmanager
def in_lists() -> Iterator[None]:
    """Let blocks lie in lists: the same arithmetic, so that results must be equal bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "Tiers", PlainTiers)
        yield


@functools.cache
def shared(name: str, *configs: Any) -> Any:
    """Return a model that tests share, with what tiers need if its attention can."""
    attention = [] if name == "gemma2" else [AttentionConfig()]
    return hf_accel.optimize(build(name), [DecodingConfig(), KVCacheConfig(), *attention, *configs])


@functools.cache
def stock(name: str) -> Any:
    return build(name)


def smallest(model: Any, rows: int, tokens: int, bits: int | None = None) -> int:
    """Return the bytes with which blocks of 16 tokens just fit."""
    shapes = _shapes(host_of(model)).of(model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as raised:
        divide(KVCacheConfig(store="cpu", device_budget_bytes=1), Codec(bits), shapes, rows, tokens, CPU)
    return int(re.search(r"take ([\d,]+) bytes", str(raised.value))[1].replace(",", ""))  # type: ignore[index]


def tight(model: Any, store: str, rows: int, tokens: int, bits: int | None = None, **others: Any) -> KVCacheConfig:
    """Return the config with the least budget for a call."""
    budget = smallest(model, rows, tokens, bits)
    return KVCacheConfig(bits=bits, store=store, device_budget_bytes=budget, **others)


def peaks(model: Any) -> dict[str, int]:
    """Return what the last call's tiers held at most."""
    return hf_accel.report(model).to_dict()["kv_cache"]["peak_bytes"]  # type: ignore[no-any-return]


def assert_moved(model: Any, store: str) -> None:
    found = peaks(model)
    assert found[store] > 0, f"nothing was moved: {found}"


def assert_near(expected: Any, found: Any, bits: int | None) -> None:
    """Compare greedy outcomes with logits: equal up to a choice that a turned code explains."""
    bound = TOLERANCE[bits]
    new = len(expected.logits)
    prompt = expected.sequences.shape[1] - new
    assert found.sequences.shape == expected.sequences.shape
    for row in range(len(expected.sequences)):
        for step in range(new):
            here, there = expected.logits[step][row], found.logits[step][row]
            assert (here - there).norm() <= bound * here.norm(), f"row {row}, step {step}"
            if expected.sequences[row, prompt + step] != found.sequences[row, prompt + step]:
                best = here.topk(2).values
                assert best[0] - best[1] <= 2 * (here - there).abs().max() + 1e-6
                break
