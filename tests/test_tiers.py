"""Tiers give back bit by bit what a list of tensors would, within their budgets, whatever is done to them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tier_blocks import CPU, KINDS, SHAPES, block, expect, filled, same, size_of

from hf_accel.cache.tiers.staging import Slot
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.errors import ConfigError, StorageError


class Twins:
    """Tiers and lists of tensors, given the same calls."""

    def __init__(self, seed: int, store: Any, prefetch: bool, near: int, cpu: int | None, layers: int = 3) -> None:
        self.random, self.seed = random.Random(seed), seed
        self.near, self.cpu = near, cpu
        self.tiers = Tiers(CPU, store=store, near_budget_bytes=near, cpu_budget_bytes=cpu, prefetch=prefetch)
        self.lists: list[list[Any]] = [[] for _ in range(layers)]
        self.stored: list[list[int]] = [[] for _ in range(layers)]  # bytes, which `select` does not change
        self.batch = [2] * layers
        self.dtypes = [(self.random.choice(KINDS), self.random.choice(KINDS)) for _ in range(layers)]

    def put(self, layer: int) -> None:
        self.seed += 1000
        pair = block(self.batch[layer], SHAPES[layer], self.seed, self.dtypes[layer])
        how = self.random.choice(["copy", "owned", "strided", "strided and owned"])
        given = pair if how == "copy" else tuple(part.clone() for part in pair)
        if how.startswith("strided"):  # positions of a longer buffer
            given = tuple(torch.cat([part, part], dim=2)[:, :, : part.shape[2]] for part in pair)
        self.tiers.put(layer, *given, owned=how.endswith("owned"))
        if how in ("strided", "copy"):
            pair = tuple(part.clone() for part in pair)
            for part in given:
                part.zero_()  # the tiers must not keep the caller's tensors
        self.lists[layer].append(pair)
        self.stored[layer].append(size_of(pair))

    def pop(self, layer: int) -> None:
        if not self.lists[layer]:
            with pytest.raises(IndexError):
                self.tiers.pop(layer)
            return
        found = self.tiers.pop(layer)
        assert same(found, self.lists[layer].pop())
        self.stored[layer].pop()
        for part in found:
            part.zero_()  # the caller's own

    def select(self, layer: int) -> None:
        batch = self.batch[layer]
        kind = self.random.choice(["permutation", "duplicates", "growing", "shrinking", "identity"])
        rows = list(range(batch))
        if kind == "permutation":
            self.random.shuffle(rows)
        elif kind == "duplicates":
            rows = [self.random.randrange(batch) for _ in rows]
        elif kind == "growing" and batch <= 2:
            rows = [row for row in rows for _ in range(2)]
        elif kind == "shrinking" and batch > 1:
            rows = sorted(self.random.sample(rows, batch - 1))
        index = torch.tensor(rows)
        self.tiers.select(layer, index)
        self.lists[layer] = [tuple(part[index] for part in pair) for pair in self.lists[layer]]
        self.batch[layer] = len(rows)

    def drop(self, layer: int | None) -> None:
        self.tiers.drop(layer)
        for name in range(len(self.lists)) if layer is None else [layer]:
            self.lists[name], self.stored[name] = [], []

    def read(self, layer: int, stop: int | None = None) -> None:
        found = 0
        for index, pair in enumerate(self.tiers.read(layer)):
            assert same(pair, self.lists[layer][index]), (layer, index)
            found += 1
            if found == stop:
                return
        assert found == len(self.lists[layer])

    def check(self) -> None:
        held = self.tiers.bytes_held()
        assert held["near"] <= self.near
        assert self.cpu is None or held["cpu"] <= self.cpu
        assert all(self.tiers.bytes_peak()[tier] >= held[tier] for tier in held)
        assert self.tiers.bytes_peak()["near"] <= self.near
        assert [self.tiers.count(layer) for layer in range(len(self.lists))] == [len(blocks) for blocks in self.lists]
        by_tier = {"near": 2 * self.tiers._staging.size, "cpu": 0, "disk": 0}
        for layer, blocks in self.tiers._layers.items():
            assert [part.layout.size for part in blocks] == self.stored[layer]
            for part in blocks:
                by_tier[part.tier] += part.layout.size
                memory = [] if part.keys is None else [part.keys, part.values]
                assert sum(tensor.untyped_storage().nbytes() for tensor in memory) == part.layout.size * len(memory) / 2
        assert sum(slot.on_device.untyped_storage().nbytes() for slot in self.tiers._staging._slots) <= by_tier["near"]
        assert (held["near"], held["cpu"]) == (by_tier["near"], by_tier["cpu"])
        assert held["disk"] >= by_tier["disk"]
        if self.tiers._spill is not None:
            assert held["disk"] == Path(f"/proc/self/fd/{self.tiers._spill._file.fileno()}").stat().st_size

    def play(self, steps: int) -> None:
        for _ in range(steps):
            layer = self.random.randrange(len(self.lists))
            what = self.random.choices(
                ["put", "pop", "select", "drop", "read", "step", "some"], [8, 4, 2, 0.3, 2, 2, 1]
            )
            if what[0] == "step":
                for name in range(len(self.lists)):
                    self.read(name)
            elif what[0] == "some":
                self.read(layer, stop=self.random.randint(1, 3))
            else:
                argument = None if what[0] == "drop" and self.random.random() < 0.5 else layer
                getattr(self, what[0])(argument)
            self.check()


LARGEST = 2 * 3 * 4 * 16 * 4 * 2  # bytes of the largest block: batch 4, fp32


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    "store, near, cpu",
    [
        ("cpu", 2 * LARGEST, None),
        ("cpu", 5 * LARGEST, None),
        ("cpu", 4 * LARGEST, 400 * LARGEST),
        ("disk", 2 * LARGEST, None),
        ("disk", 3 * LARGEST, 0),
        ("disk", 3 * LARGEST, LARGEST),
        ("disk", 100 * LARGEST, 100 * LARGEST),
        ("disk", 2 * LARGEST + 777, 1234),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_as_a_list_of_tensors(seed: int, store: str, near: int, cpu: int | None, prefetch: bool) -> None:
    twins = Twins(seed, store, prefetch, near, cpu)
    twins.play(150)
    twins.tiers.close()
    assert set(twins.tiers.bytes_held().values()) == {0}


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_damaged_buffer_would_be_seen(prefetch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is able to fail: one byte of one buffer is enough."""
    load = Slot.load

    def damaging(self: Slot, *args: Any) -> None:
        load(self, *args)
        self.on_device[3] ^= 1

    monkeypatch.setattr(Slot, "load", damaging)
    twins = Twins(1, "disk", prefetch, 2 * LARGEST, 0)
    with pytest.raises(AssertionError):
        twins.play(150)


def test_places() -> None:
    """The newest are near, older ones in CPU memory, the oldest on the disk."""
    size = size_of(block(2, SHAPES[0], 0))
    tiers, pairs = filled(1, 9, near_budget_bytes=5 * size, cpu_budget_bytes=2 * size)
    assert [part.tier for part in tiers._layers[0]] == ["disk"] * 4 + ["cpu"] * 2 + ["near"] * 3
    expect(tiers, pairs)
    assert tiers.bytes_held() == {"near": 5 * size, "cpu": 2 * size, "disk": 4 * size}
    for _ in range(3):
        tiers.pop(0)
    assert tiers.bytes_held() == {"near": 2 * size, "cpu": 2 * size, "disk": 4 * size}
    tiers.drop()
    assert tiers.bytes_held() == {"near": 2 * size, "cpu": 0, "disk": 0}
    assert tiers.bytes_peak() == {"near": 5 * size, "cpu": 2 * size, "disk": 4 * size}


def test_owned_tensors_are_not_copied() -> None:
    tiers = Tiers(CPU, store="cpu", near_budget_bytes=1 << 20)
    keys, values = block(2, SHAPES[0], 0)
    tiers.put(0, keys, values, owned=True)
    tiers.put(0, keys, values)
    (first, _), (second, _) = list(tiers.read(0))
    assert first.data_ptr() == keys.data_ptr()
    assert second.data_ptr() != keys.data_ptr()


def test_memory_of_a_block_that_leaves_is_used_again() -> None:
    size = size_of(block(2, SHAPES[0], 0))
    tiers, _ = filled(1, 1, near_budget_bytes=3 * size)
    before = tiers._layers[0][0].keys.data_ptr()  # type: ignore[union-attr]
    tiers.put(0, *block(2, SHAPES[0], 1))
    assert [part.tier for part in tiers._layers[0]] == ["disk", "near"]
    assert tiers._layers[0][1].keys.data_ptr() == before  # type: ignore[union-attr]


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_a_near_budget_without_room_for_buffers(store: Any) -> None:
    pair = block(2, SHAPES[0], 0)
    tiers = Tiers(CPU, store=store, near_budget_bytes=2 * size_of(pair) - 1)
    for call in (lambda: tiers.check(size_of(pair)), lambda: tiers.put(0, *pair)):
        with pytest.raises(ConfigError, match=f"{2 * size_of(pair)} bytes"):
            call()
    assert tiers.count(0) == 0
    tiers.check(size_of(pair) - 1)


def test_rows_that_need_larger_buffers() -> None:
    """Growing beyond the near budget is refused before anything changes; within it near blocks make room."""
    size = size_of(block(2, SHAPES[0], 0))
    tiers, pairs = filled(2, 4, near_budget_bytes=2 * size)
    with pytest.raises(ConfigError, match=f"{4 * size} bytes"):
        tiers.select(0, torch.tensor([0, 0, 1, 1]))
    expect(tiers, pairs)
    with pytest.raises(IndexError):
        tiers.select(0, torch.tensor([0, 2]))
    tiers, pairs = filled(2, 4, near_budget_bytes=5 * size)
    tiers.select(0, torch.tensor([0, 0, 1, 1]))
    assert tiers.bytes_held()["near"] <= 5 * size
    pairs[0] = [tuple(part[[0, 0, 1, 1]] for part in pair) for pair in pairs[0]]
    expect(tiers, pairs)


def test_a_full_cpu_store_says_what_to_do() -> None:
    size = size_of(block(2, SHAPES[0], 0))
    tiers, pairs = filled(1, 3, store="cpu", near_budget_bytes=3 * size, cpu_budget_bytes=2 * size)
    with pytest.raises(StorageError, match='store="disk"') as caught:
        tiers.put(0, *block(2, SHAPES[0], 9))
    assert f"{size} bytes of layer 0" in str(caught.value)
    expect(tiers, pairs)
    tiers.pop(0)
    tiers.put(0, *pairs[0][2])
    expect(tiers, pairs)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("owned", [False, True])
def test_any_mode(mode: Any, owned: bool) -> None:
    """What was put in one mode is moved, written over and read in another."""
    size = size_of(block(2, SHAPES[0], 0))
    tiers = Tiers(CPU, store="disk", near_budget_bytes=4 * size)
    pairs: list[Any] = []
    for i in range(8):
        with mode() if i % 2 else torch.enable_grad():
            pair = tuple(torch.randn(2, 2, 4, 8, requires_grad=True) for _ in range(2))
            pairs.append(tuple(part.detach().clone() for part in pair))
            tiers.put(0, *pair, owned=owned)
            tiers.select(0, torch.tensor([1, 0]))
            pairs = [tuple(part.flip(0) for part in pair) for pair in pairs]
            expect(tiers, [pairs])
    assert not any(part.requires_grad for pair in tiers.read(0) for part in pair)
