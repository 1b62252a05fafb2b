"""The file of cache blocks: full or failing disks lose nothing, damage is found, and no file is ever left behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_accel.cache.tiers.layout import Layout, runs_of
from hf_accel.cache.tiers.spill import Spill
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.errors import ConfigError, StorageError

CPU = torch.device("cpu")
SHAPE = (2, 2, 4, 8)
SIZE = 2 * 2 * 2 * 4 * 8 * 4


def pair(value: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(value)
    keys, values = (torch.randn(batch, *SHAPE[1:], generator=generator) for _ in range(2))
    return keys, values


def expect(tiers: Tiers, pairs: list[Any], layer: int = 0) -> None:
    found = [(keys.clone(), values.clone()) for keys, values in tiers.read(layer)]
    assert len(found) == len(pairs)
    for one, other in zip(found, pairs):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def filled(blocks: int = 4, folder: Path | None = None, near: int = 2 * SIZE, **options: Any) -> tuple[Tiers, list]:
    tiers = Tiers(CPU, store="disk", near_budget_bytes=near, folder=folder, **options)
    pairs = [pair(i) for i in range(blocks)]
    for one in pairs:
        tiers.put(0, *one)
    return tiers, pairs


def file_of(tiers: Tiers) -> int:
    return tiers._spill._file.fileno()  # type: ignore[union-attr]


def failing(name: str, number: int, after: int = 0, partial: int = 0) -> Any:
    """Return a function that does as os.`name` for some calls, then writes `partial` bytes once, then fails."""
    real, calls = getattr(os, name), [0]

    def call(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] <= after:
            return real(*args)
        if partial and calls[0] == after + 1:
            return real(args[0], [args[1][0][:partial]], args[2])
        raise OSError(number, os.strerror(number))

    return call


FULL = [
    ("posix_fallocate", errno.ENOSPC, 0, 0),
    ("posix_fallocate", errno.EDQUOT, 0, 0),
    ("pwritev", errno.ENOSPC, 0, 0),
    ("pwritev", errno.ENOSPC, 1, 0),
    ("pwritev", errno.ENOSPC, 0, 100),
    ("pwritev", errno.EFBIG, 0, 0),
]


@pytest.mark.parametrize("name, number, after, partial", FULL)
@pytest.mark.parametrize("near", [2 * SIZE, 4 * SIZE])
def test_a_full_disk_loses_nothing(
    name: str, number: int, after: int, partial: int, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers, pairs = filled(near=near)
    before = tiers.bytes_held()
    monkeypatch.setattr(os, name, failing(name, number, after, partial))
    with pytest.raises(StorageError, match=r"full .*fewer tokens") as caught:
        tiers.put(0, *pair(9))
    assert os.strerror(number) in str(caught.value)
    assert tiers.bytes_held() == before
    assert os.fstat(file_of(tiers)).st_size == before["disk"]
    expect(tiers, pairs)
    monkeypatch.undo()
    tiers.put(0, *pair(9))  # there is room again
    expect(tiers, [*pairs, pair(9)])


def test_a_full_disk_with_room_in_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A near block of two rows cannot go to the disk; the new one, of one row, still fits in CPU memory."""
    tiers, pairs = filled(1, near=3 * SIZE, cpu_budget_bytes=SIZE // 2)
    tiers.select(0, torch.tensor([1]))
    monkeypatch.setattr(os, "posix_fallocate", failing("posix_fallocate", errno.ENOSPC))
    tiers.put(0, *pair(5, batch=1))
    assert [block.tier for block in tiers._layers[0]] == ["near", "cpu"]
    assert len(tiers.notes) == 1
    assert "full" in tiers.notes[0]
    expect(tiers, [tuple(part[[1]] for part in pairs[0]), pair(5, batch=1)])
    with pytest.raises(StorageError):
        tiers.put(0, *pair(6, batch=1))
    assert len(tiers.notes) == 1
    assert tiers.count(0) == 2


def test_a_full_disk_while_a_freed_place_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers, pairs = filled()
    tiers.pop(0)
    held = tiers.bytes_held()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing("pwritev", errno.ENOSPC, 1))
        with pytest.raises(StorageError):
            tiers.put(0, *pair(8))
    tiers.put(0, *pair(9))
    assert tiers.bytes_held() == held
    expect(tiers, [*pairs[:3], pair(9)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_real_full_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a stand-in for the call: the kernel itself says that there is no room."""
    tiers, pairs = filled()
    saved = os.dup(file_of(tiers))
    monkeypatch.setattr(tiers._spill, "_reserves", False)
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), file_of(tiers))
        with pytest.raises(StorageError, match="No space left"):
            tiers.put(0, *pair(9))
    os.dup2(saved, file_of(tiers))
    os.close(saved)
    expect(tiers, pairs)


def test_writing_that_fails_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers, pairs = filled(near=3 * SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing("pwritev", errno.EIO))
        with pytest.raises(StorageError, match="Input/output error"):
            tiers.put(0, *pair(9))
    expect(tiers, pairs)


def test_a_file_system_that_cannot_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing("posix_fallocate", errno.EOPNOTSUPP))
    expect(*filled())


def test_a_platform_without_positioned_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "pwritev", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    tiers, pairs = filled()
    for _ in range(20):
        expect(tiers, pairs)
    tiers.pop(0)
    tiers.put(0, *pairs[3])
    expect(tiers, pairs)


def test_short_reads_and_writes_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwritev", lambda file, views, at: write(file, [views[0][:5]], at))
    tiers, pairs = filled()
    expect(tiers, pairs)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("rows", [None, [1, 0], [0, 0]])
def test_a_truncated_file(prefetch: bool, rows: list[int] | None) -> None:
    tiers, pairs = filled(prefetch=prefetch)
    expect(tiers, pairs)
    os.ftruncate(file_of(tiers), 2 * SIZE + 100)
    if rows is not None:
        tiers.select(0, torch.tensor(rows))
        pairs = [tuple(part[rows] for part in one) for one in pairs]
    blocks = tiers.read(0)
    for wanted in pairs[:2]:
        assert torch.equal(next(blocks)[0], wanted[0])
    with pytest.raises(StorageError, match="truncated"):
        next(blocks)
    with pytest.raises(StorageError, match="truncated"):
        tiers.pop(0)
    assert tiers.count(0) == 4


def test_reading_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers, pairs = filled()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing("preadv", errno.EIO, after=1))
        blocks = tiers.read(0)
        next(blocks)
        with pytest.raises(StorageError, match="Input/output error"):
            next(blocks)
    expect(tiers, pairs)


def altered(tiers: Tiers, at: int) -> None:
    byte = os.pread(file_of(tiers), 1, at)
    os.pwrite(file_of(tiers), bytes([byte[0] ^ 0x10]), at)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("at", [0, 3, SIZE // 2, SIZE - 1])
@pytest.mark.parametrize("rows", [None, [1, 0]])
def test_altered_bytes(prefetch: bool, at: int, rows: list[int] | None) -> None:
    tiers, _ = filled(prefetch=prefetch)
    altered(tiers, SIZE + at)
    if rows is not None:
        tiers.select(0, torch.tensor(rows))
    blocks = tiers.read(0)
    next(blocks)
    with pytest.raises(StorageError, match="changed"):
        next(blocks)


def test_altered_rows_that_nobody_reads_do_no_harm() -> None:
    tiers, pairs = filled()
    altered(tiers, SIZE)  # row 0 of the keys of the second block
    tiers.select(0, torch.tensor([1, 1]))
    expect(tiers, [tuple(part[[1, 1]] for part in one) for one in pairs])


def test_every_read_is_checked() -> None:
    tiers, pairs = filled()
    for _ in range(20):
        expect(tiers, pairs)
        altered(tiers, SIZE)
        with pytest.raises(StorageError, match="changed"):
            list(tiers.read(0))
        altered(tiers, SIZE)


def test_places_are_used_again() -> None:
    tiers, pairs = filled(6)
    for i in range(20):
        tiers.pop(0)
        tiers.pop(0)
        pairs[-2:] = [pair(100 + i), pair(200 + i)]
        for one in pairs[-2:]:
            tiers.put(0, *one)
        assert tiers.bytes_held()["disk"] == 6 * SIZE
    expect(tiers, pairs)
    tiers.drop()
    assert os.fstat(file_of(tiers)).st_size == tiers.bytes_held()["disk"] == 0


def test_runs() -> None:
    assert runs_of((0, 1, 2)) == [(0, 0, 3)]
    assert runs_of((2, 3, 3, 0)) == [(0, 2, 2), (2, 3, 1), (3, 0, 1)]
    assert runs_of(()) == []


@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.float32), (torch.float32, torch.uint8)])
def test_both_parts_are_aligned(dtypes: Any) -> None:
    layout = Layout(torch.Size((1, 1, 3, 1)), torch.Size((1, 1, 3, 1)), dtypes)
    for part, dtype in zip(layout.views(torch.zeros(layout.size, dtype=torch.uint8)), dtypes):
        assert part.dtype == dtype
        assert part.data_ptr() % dtype.itemsize == 0


@pytest.mark.parametrize("words", [8, 4, 1])
def test_a_checksum_of_any_row_length(words: int) -> None:
    layout = Layout(torch.Size((3, 1, 1, words)), torch.Size((3, 1, 5, words)), (torch.uint8, torch.uint8))
    buffer = torch.randint(0, 256, (layout.size,), dtype=torch.uint8).numpy()
    before = layout.digests(layout.parts_of(buffer))
    for at in range(layout.size):
        buffer[at] ^= 1
        assert layout.digests(layout.parts_of(buffer)) != before
        buffer[at] ^= 1


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (tmp_path / "missing", file):
        with pytest.raises(ConfigError, match=str(folder)):
            Tiers(CPU, store="disk", near_budget_bytes=2 * SIZE, folder=folder)
    with pytest.raises(ConfigError, match="'tape'"):
        Tiers(CPU, store="tape", near_budget_bytes=2 * SIZE)  # type: ignore[arg-type]

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ConfigError, match=f"{tmp_path}.*Permission denied"):
        Spill(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write in any folder")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Spill(tmp_path)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    tiers, pairs = filled(folder=folder)
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
    expect(tiers, pairs)
    tiers.put(0, *pair(9))
    expect(tiers, [*pairs, pair(9)])
