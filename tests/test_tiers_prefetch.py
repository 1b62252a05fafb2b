"""Blocks of the disk are read ahead, never stale, by a thread that ends with the tiers it works for."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tier_blocks import SHAPES, block, expect, filled, same

from hf_accel.cache.tiers.spill import Spill
from hf_accel.errors import StorageError


def test_blocks_are_there_before_they_are_wanted() -> None:
    tiers, pairs = filled(3, 5)
    for _ in range(4):
        for layer, expected in enumerate(pairs):
            for pair, wanted in zip(tiers.read(layer), expected, strict=True):
                assert same(pair, wanted)
                until = time.monotonic() + 10
                while tiers._staging._results.empty() and time.monotonic() < until:
                    time.sleep(0.0005)  # computing
    assert tiers.reads_ahead() == (4 * 3 * 5 - 1, 4 * 3 * 5 - 1)  # all but the very first


def test_reading_goes_on_while_the_block_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next read has begun on another thread, and not ended, when a block is handed over."""
    tiers, _ = filled(1, 3)
    begun, go_on, threads = threading.Event(), threading.Event(), []
    read = Spill.read

    def waiting(self: Spill, *args: Any) -> None:
        threads.append(threading.current_thread())
        if len(threads) > 1:
            begun.set()
            assert go_on.wait(10)
        read(self, *args)

    monkeypatch.setattr(Spill, "read", waiting)
    blocks = tiers.read(0)
    next(blocks)
    assert begun.wait(10)
    go_on.set()
    assert len(list(blocks)) == 2
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_without_prefetch_there_is_no_thread() -> None:
    tiers, pairs = filled(2, 3, prefetch=False)
    expect(tiers, pairs)
    assert tiers._staging._thread is None
    assert tiers.reads_ahead() == (0, 0)


@pytest.mark.parametrize("change", ["pop and put", "select", "drop and put"])
@pytest.mark.parametrize("is_slow", [False, True])
def test_what_was_read_ahead_is_never_stale(change: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block read ahead is replaced by another in the same place of the file, before or while it is read."""
    tiers, pairs = filled(1, 2)
    read = Spill.read

    def slowly(self: Spill, *args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        read(self, *args)

    if is_slow:
        monkeypatch.setattr(Spill, "read", slowly)
    blocks = tiers.read(0)
    assert same(next(blocks), pairs[0][0])  # now the second is read ahead
    assert tiers._staging._ahead is not None
    assert tiers._staging._ahead[0] is tiers._layers[0][1]
    if not is_slow:
        time.sleep(0.02)
    offset = tiers._layers[0][1].extent.offset  # type: ignore[union-attr]
    other = block(2, SHAPES[0], 77)
    if change == "pop and put":
        assert same(tiers.pop(0), pairs[0].pop())
        tiers.put(0, *other)
        pairs[0].append(other)
        assert tiers._layers[0][1].extent.offset == offset  # type: ignore[union-attr]
    elif change == "select":
        tiers.select(0, torch.tensor([1, 1]))
        pairs[0] = [tuple(part[[1, 1]] for part in pair) for pair in pairs[0]]
    else:
        tiers.drop(0)
        for pair in (other, pairs[0][0]):
            tiers.put(0, *pair)
        pairs[0] = [other, pairs[0][0]]
    expect(tiers, pairs)
    expect(tiers, pairs)


def test_errors_of_the_thread_are_raised_at_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers, pairs = filled(2, 3)
    bad = tiers._layers[0][1].extent
    read = Spill.read

    def failing(self: Spill, record: Any, *args: Any) -> None:
        if record is bad:
            raise StorageError("planted")
        read(self, record, *args)

    monkeypatch.setattr(Spill, "read", failing)
    blocks = tiers.read(0)
    assert same(next(blocks), pairs[0][0])
    with pytest.raises(StorageError, match="planted"):
        next(blocks)
    assert all(same(pair, wanted) for pair, wanted in zip(tiers.read(1), pairs[1], strict=True))
    monkeypatch.undo()
    expect(tiers, pairs)


def test_two_do_not_disturb_each_other() -> None:
    one, first = filled(2, 4)
    two, second = filled(2, 3, store="cpu")
    three, third = filled(1, 4)
    for _ in range(3):
        for pair, wanted, other, other_wanted in zip(one.read(0), first[0], three.read(0), third[0], strict=True):
            assert same(pair, wanted)
            assert same(other, other_wanted)
        expect(two, second)
    one.close()
    expect(three, third)


@pytest.mark.parametrize("how", ["close", "collect", "with"])
def test_closing_ends_the_thread_and_the_file(how: str) -> None:
    tiers, pairs = filled(2, 3)
    expect(tiers, pairs)
    thread, file = tiers._staging._thread, tiers._spill._file  # type: ignore[union-attr]
    assert thread is not None
    assert thread.is_alive()
    gone = weakref.ref(tiers)
    if how == "close":
        tiers.close()
        tiers.close()
        for call in (lambda: tiers.put(0, *pairs[0][0]), lambda: list(tiers.read(0)), lambda: tiers.pop(0)):
            with pytest.raises(StorageError, match="closed"):
                call()
    elif how == "with":
        with tiers:
            pass
    else:
        del tiers
        gc.collect()
        assert gone() is None
    assert not thread.is_alive()
    assert file.closed


def test_exit_of_the_interpreter(tmp_path: Path) -> None:
    """With reads under way, of memory and of a file, and nothing closed: no hanging, no message, no file."""
    script = f"""
import torch
from hf_accel.cache.tiers.tiers import Tiers
kept = []
for store in ("cpu", "disk"):
    tiers = Tiers(torch.device("cpu"), store=store, near_budget_bytes=4 << 20, folder={str(tmp_path)!r})
    for i in range(6):
        tiers.put(0, torch.full((1, 1, 64, 4096), float(i)), torch.ones(1, 1, 64, 4096), owned=True)
    blocks = tiers.read(0)
    next(blocks)
    kept.append((tiers, blocks))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
