"""Damage of every kind to the file of cache blocks, at any moment: an error or what was put, never anything else."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_calls import stock, tight
from models import build
from test_kv_faults import TOKENS, ask, watched
from tier_blocks import SHAPES, block, same, size_of
from transformers import LogitsProcessor, LogitsProcessorList

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.cache.tiers.layout import Layout
from hf_accel.cache.tiers.spill import Spill
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.errors import StorageError

CPU = torch.device("cpu")
Damage = Callable[[int, random.Random, list[bytes]], None]


def size(file: int) -> int:
    return os.fstat(file).st_size


def flip(file: int, dice: random.Random, before: list[bytes]) -> None:
    at = dice.randrange(size(file))
    os.pwrite(file, bytes([os.pread(file, 1, at)[0] ^ (1 << dice.randrange(8))]), at)


def zero(file: int, dice: random.Random, before: list[bytes]) -> None:
    at = dice.randrange(size(file))
    os.pwrite(file, bytes(min(512, size(file) - at)), at)


def exchange(length: int, is_aligned: bool = True) -> Damage:
    """Return what puts two pieces in each other's place: no sum of them changes."""

    def damage(file: int, dice: random.Random, before: list[bytes]) -> None:
        span = max(1, min(length, size(file) // 2))
        if is_aligned:
            one, other = (span * dice.randrange(size(file) // span) for _ in range(2))
        else:
            one, other = (dice.randrange(size(file) - span + 1) for _ in range(2))
        pieces = os.pread(file, span, one), os.pread(file, span, other)
        os.pwrite(file, pieces[1], one)
        os.pwrite(file, pieces[0], other)

    return damage


def cut(file: int, dice: random.Random, before: list[bytes]) -> None:
    os.ftruncate(file, dice.randrange(size(file)))


def put_back(file: int, dice: random.Random, before: list[bytes]) -> None:
    """Write what was in the file some time ago, at a place where it differs from what is there now."""
    old = dice.choice(before)
    changed = [at for at, (one, other) in enumerate(zip(old, os.pread(file, len(old), 0))) if one != other]
    if not changed:
        return
    at = dice.choice(changed)
    os.pwrite(file, old[at : at + dice.choice([64, 512, 1 << 20])], at)


DAMAGES: dict[str, Damage] = {
    "bit": flip,
    "zeros": zero,
    "words": exchange(8),
    "bytes": exchange(1, is_aligned=False),
    "sectors": exchange(512),
    "pages": exchange(4096),
    "truncation": cut,
    "old content": put_back,
}


def play(seed: int, damage: Damage) -> tuple[int, int]:
    """Put, take back, choose rows and read, with damage in between; return how often it was noticed, and reads."""
    dice = random.Random(seed)
    shape = dice.choice(SHAPES)
    tiers = Tiers(
        CPU,
        store="disk",
        near_budget_bytes=4 * size_of(block(4, shape, 0)),
        cpu_budget_bytes=0,
        prefetch=dice.random() < 0.5,
    )
    file = tiers._spill._file.fileno()  # type: ignore[union-attr]
    put: list[Any] = []
    before: list[bytes] = []
    noticed = reads = 0
    with tiers:
        for step in range(60):
            act = dice.randrange(8)
            if act < 3 or not put:
                rows = len(put[0][0]) if put else 2
                put.append(block(rows, shape, 1000 * seed + step))
                tiers.put(0, *put[-1])
            elif act == 3 and put[0][0].shape[0] < 4:
                rows_kept = torch.tensor([dice.randrange(len(put[0][0])) for _ in range(dice.choice([1, 2, 4]))])
                tiers.select(0, rows_kept)
                put = [tuple(part[rows_kept] for part in pair) for pair in put]
            elif act == 4 and size(file):
                before.append(os.pread(file, size(file), 0))
            elif act == 5 and size(file) and before:
                damage(file, dice, before)
            elif act == 6:
                try:
                    assert same(tiers.pop(0), put[-1])
                    put.pop()
                except StorageError:
                    noticed += 1
                    return noticed, reads  # the call ends there
            else:
                reads += 1
                try:
                    for count, pair in enumerate(tiers.read(0)):
                        assert same(pair, put[count])
                    assert count == len(put) - 1
                except StorageError:
                    noticed += 1
                    return noticed, reads
    return noticed, reads


def walk(name: str, seeds: range) -> None:
    noticed, reads = (sum(column) for column in zip(*(play(seed, DAMAGES[name]) for seed in seeds)))
    # what was put back is often what is there
    least = len(seeds) // (40 if name == "old content" else 8)
    assert noticed >= least, "the damage was never where anything is read"
    assert reads > len(seeds)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_at_any_moment(name: str) -> None:
    walk(name, range(25))


def sums(self: Layout, parts: list[Any]) -> list[list[bytes]]:
    """Stand for digests that ignore order."""
    return [
        [row.astype("u8").sum().tobytes() for row in part.reshape(self.rows, size)]
        for part, size in zip(parts, self.row_bytes)
    ]


def never(self: Layout, parts: list[Any]) -> list[list[bytes]]:
    return [[b""] * self.rows for _ in parts]


@pytest.mark.parametrize("name, digests", [("words", sums), ("pages", never), ("zeros", never), ("bit", never)])
def test_planted_digests_are_seen(name: str, digests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "digests", digests)
    with pytest.raises(AssertionError):
        walk(name, range(25))


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_much_damage_at_any_moment(name: str) -> None:
    walk(name, range(100, 1100))


@pytest.mark.parametrize("reads", [0, 1, 5])
@pytest.mark.parametrize("rows", [None, (1, 0), (1, 1, 0)])
@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (2, 2, 16, 64), (2, 4, 256, 128)])
def test_whole_records_and_rows_exchanged(shape: tuple[int, ...], rows: tuple[int, ...] | None, reads: int) -> None:
    """What is exchanged is whole and was written by us: only its place is another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spill = Spill(None)
        layout = Layout(torch.Size(shape), torch.Size(shape), (torch.float32, torch.float32))
        pairs = [(torch.randn(shape), torch.randn(shape)) for _ in range(3)]
    records = [spill.write(layout, layout.bytes_of(*pair)) for pair in pairs]
    into = torch.zeros(2 * layout.size, dtype=torch.uint8).numpy()
    shown = layout if rows is None else layout.of_rows(len(rows))
    runs = [(0, 0, 2)] if rows is None else [(at, row, 1) for at, row in enumerate(rows)]

    def read(at: int) -> bool:
        spill.read(records[at], shown, runs, into)  # type: ignore[arg-type]
        found = shown.views(torch.from_numpy(into))
        return same(found, tuple(part if rows is None else part[list(rows)] for part in pairs[at]))

    for _ in range(reads):
        assert all(read(at) for at in range(3))
    file, row, half = spill._file.fileno(), layout.row_bytes[0], layout.size // 2
    pieces = {"records": (0, layout.size, layout.size), "rows": (0, row, row), "keys and values": (0, half, half)}
    for one, other, length in pieces.values():
        whole = os.pread(file, 3 * layout.size, 0)
        os.pwrite(file, whole[other : other + length], one)
        os.pwrite(file, whole[one : one + length], other)
        with pytest.raises(StorageError, match="changed"):
            read(0)
        assert read(2)
        os.pwrite(file, whole, 0)
        assert all(read(at) for at in range(3))
    spill.close()


class Harming(LogitsProcessor):
    """Damages the file of a call after its blocks were read many times."""

    def __init__(self, made: list[Tiers], name: str) -> None:
        self.made, self.damage, self.left, self.before = made, DAMAGES[name], 30, b""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left in (0, 10):
            file = self.made[-1]._spill._file.fileno()  # type: ignore[union-attr]
            assert size(file)
            if self.left:
                self.before = os.pread(file, size(file), 0)[::-1]  # as if it had been something else
            else:
                for seed in range(50):
                    if size(file):
                        self.damage(file, random.Random(seed), [self.before])
        return scores


@pytest.fixture(scope="module")
def spilling() -> Any:
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), AttentionConfig(), KVCacheConfig()])
    yield model
    hf_accel.restore(model)


@pytest.mark.parametrize("name, beams", [(name, 1 + at % 2) for at, name in enumerate(DAMAGES)])
def test_damage_in_the_middle_of_a_call(name: str, beams: int, spilling: Any) -> None:
    given = {"num_beams": beams, "kv_cache": tight(spilling, "disk", beams, TOKENS)}
    with watched() as made:
        processors = LogitsProcessorList([Harming(made, name)])
        with pytest.raises(StorageError):
            ask(spilling, logits_processor=processors, **given)
    assert torch.equal(ask(spilling, **given), ask(stock("llama"), num_beams=beams))


def test_old_content_of_a_place_that_was_used_again() -> None:
    spill = Spill(None)
    layout = Layout(torch.Size((1, 2, 4, 8)), torch.Size((1, 2, 4, 8)), (torch.float32, torch.float32))
    into = torch.zeros(layout.size, dtype=torch.uint8).numpy()
    pairs = [(torch.full((1, 2, 4, 8), float(at)), torch.ones(1, 2, 4, 8)) for at in range(4)]
    first, kept = (spill.write(layout, layout.bytes_of(*pair)) for pair in pairs[:2])
    for pair in pairs[2:]:
        old = os.pread(spill._file.fileno(), layout.size, 0)
        spill.free(first)  # type: ignore[arg-type]
        first = spill.write(layout, layout.bytes_of(*pair))
        spill.read(first, layout, [(0, 0, 1)], into)  # type: ignore[arg-type]
        new = os.pread(spill._file.fileno(), layout.size, 0)
        os.pwrite(spill._file.fileno(), old, 0)
        with pytest.raises(StorageError, match="changed"):
            spill.read(first, layout, [(0, 0, 1)], into)  # type: ignore[arg-type]
        os.pwrite(spill._file.fileno(), new, 0)
    spill.read(kept, layout, [(0, 0, 1)], into)  # type: ignore[arg-type]
    spill.close()


def test_the_file_is_nobody_elses(tmp_path: Path) -> None:
    """Also where others may write to the folder: it has no name that could be opened or be put in its place."""
    tmp_path.chmod(0o1777)
    spill = Spill(tmp_path)
    found = os.fstat(spill._file.fileno())
    assert not list(tmp_path.iterdir())
    assert (found.st_nlink, found.st_mode & 0o077) == (0, 0)
    spill.close()
