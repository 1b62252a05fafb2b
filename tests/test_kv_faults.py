"""Disks that fill up, files that are damaged and processes that are killed, in the middle of whole calls."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_calls import assert_moved, peaks, shared, smallest, stock, tight
from models import build, prompt
from processes import Running
from test_spill import failing

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.cache import assembly as caching
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.errors import StorageError

IDS, NEW = prompt(1, 60), 50
TOKENS = 60 + NEW


def ask(model: Any, **given: Any) -> Any:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **given})


def spilling(**others: Any) -> Any:
    config = tight(shared("llama"), "disk", 1, TOKENS, **others)
    return hf_accel.optimize(build("llama"), [DecodingConfig(), config])


class At:
    """A streamer that does something at one token of the text."""

    def __init__(self, token: int, act: Any) -> None:
        self.left, self.act = token + 1, act  # the prompt is put first

    def put(self, value: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def end(self) -> None:
        pass


@contextmanager
def watched() -> Iterator[list[Tiers]]:
    """Collect the tiers that calls make."""
    made: list[Tiers] = []

    def make(*args: Any, **kwargs: Any) -> Tiers:
        made.append(Tiers(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "Tiers", make)
        yield made


def test_a_disk_that_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = spilling(), ask(stock("llama"))
    assert torch.equal(ask(model), expected)
    for name in ("posix_fallocate", "pwritev"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(name, errno.ENOSPC, after=9))
            with pytest.raises(StorageError, match="full"):
                ask(model)
        assert torch.equal(ask(model), expected)
        assert_moved(model, "disk")


@pytest.mark.parametrize("after", [0, 3, 8])
def test_a_full_disk_with_memory_left(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file has no more room for may lie in memory as long as there is some; else it is an error."""
    with hf_accel.optimized(build("llama"), [DecodingConfig(), AttentionConfig(), KVCacheConfig()]) as model:
        least = smallest(model, 1, TOKENS)
        for more in (0, 6000, 40_000, 10**6):
            config = KVCacheConfig(store="disk", device_budget_bytes=least + more)
            with monkeypatch.context() as patch:
                patch.setattr(os, "posix_fallocate", failing("posix_fallocate", errno.ENOSPC, after=after))
                if more == 10**6:
                    assert torch.equal(ask(model, kv_cache=config), ask(stock("llama")))
                    continue
                try:
                    found = ask(model, kv_cache=config)
                except StorageError:
                    found = None
            assert found is None or torch.equal(found, ask(stock("llama")))
            assert peaks(model)["near"] <= least + more
            assert torch.equal(ask(model, kv_cache=config), ask(stock("llama")))


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_file_that_is_truncated(prefetch: bool) -> None:
    model, expected = spilling(prefetch=prefetch), ask(stock("llama"))
    with watched() as made:

        def truncate() -> None:
            os.ftruncate(made[-1]._spill._file.fileno(), 1000)  # type: ignore[union-attr]

        with pytest.raises(StorageError, match="truncated"):
            ask(model, streamer=At(20, truncate))
        assert torch.equal(ask(model), expected)
    assert len(made) == 2


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_file_that_is_overwritten(prefetch: bool) -> None:
    model, expected = spilling(prefetch=prefetch), ask(stock("llama"))
    with watched() as made:

        def overwrite() -> None:
            os.pwrite(made[-1]._spill._file.fileno(), b"\x55" * 64, 64)  # type: ignore[union-attr]

        with pytest.raises(StorageError, match="changed"):
            ask(model, streamer=At(20, overwrite))
        assert torch.equal(ask(model), expected)


def test_a_folder_that_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    model = spilling(folder=str(folder))
    found = ask(model, streamer=At(5, lambda: shutil.rmtree(folder)))
    assert not folder.exists()
    assert torch.equal(found, ask(stock("llama")))
    assert_moved(model, "disk")


def test_the_file_is_closed_with_the_cache() -> None:
    """Nothing of a call stays open once its cache is gone, errors included."""
    files = Path("/proc/self/fd")
    if not files.exists():
        pytest.skip("no /proc to see open files in")
    model = spilling()
    ask(model)
    before = len(list(files.iterdir()))
    for _ in range(3):
        ask(model)
        with pytest.raises(ZeroDivisionError):
            ask(model, streamer=At(9, lambda: 1 / 0))
    assert len(list(files.iterdir())) <= before


CHILD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_kv_faults import At, IDS, ask, spilling, stock
folder, mark, what = sys.argv[2], Path(sys.argv[3]), sys.argv[4]
model, expected = spilling(folder=folder), ask(stock("llama"))
while True:
    mark_it = At(20, mark.touch)
    if not torch.equal(ask(model, streamer=mark_it), expected):
        sys.exit("another text")
    if what == "stop":
        break
"""


def start(folder: Path, mark: Path, what: str) -> Running:
    return Running(CHILD, mark.with_suffix(".output"), Path(__file__).parent, folder, mark, what)


def test_processes_that_share_a_folder_and_one_that_is_killed(tmp_path: Path) -> None:
    folder, mark = tmp_path / "cache", tmp_path / "mark"
    folder.mkdir()
    killed = start(folder, mark, "go on")
    other = start(folder, tmp_path / "other", "stop")
    until = time.monotonic() + 120
    while not mark.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert mark.exists()
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL
    assert other.wait(120) == 0
    assert list(folder.iterdir()) == []
