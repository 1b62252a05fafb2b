"""Blocks of prompts in files: the same bits in a new process, and never others, whatever happens to the folder."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Running
from safetensors.torch import load_file
from test_prefix_tenants import together
from test_prefixes import ROOT, consistent, length, plain, telling, verify

from hf_accel.cache.prefix import files as prefix_files
from hf_accel.cache.prefix import folder as block_folder
from hf_accel.cache.prefix.files import PrefixFiles
from hf_accel.cache.prefix.store import PrefixStore
from hf_accel.errors import ConfigError

TOKENS = [5, 6, 7, 8, 9, 10]
LARGE = 10**6


def store_in(folder: Path, budget: int = LARGE, block_tokens: int = 2, files_budget: int = LARGE) -> PrefixStore:
    return PrefixStore(budget, block_tokens, PrefixFiles(folder, files_budget))


def filled(folder: Path, tenant: str | None = "a", **sizes: int) -> PrefixStore:
    store = store_in(folder, **sizes)
    assert store.add(tenant, ROOT, TOKENS, telling(tenant, ROOT, TOKENS)) == len(TOKENS) // store.block_tokens
    return store


def path_of(
    folder: Path, at: int, tenant: str | None = "a", tokens: Sequence[int] = TOKENS, block_tokens: int = 2
) -> Path:
    key, _ = PrefixStore(1, block_tokens)._chain(tenant, ROOT, tokens)[at]
    return folder / f"{key.hex()}.1.safetensors"


def fails_with(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_new_store_finds_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert filled(folder).statistics().file_blocks_written == 3
    store = store_in(folder)
    assert store.match("b", ROOT, TOKENS) == store.match(None, ROOT, TOKENS) == store.match("a", b"x", TOKENS) == []
    for _ in range(2):
        found = store.match("a", ROOT, [*TOKENS, 11])
        assert len(found) == 3
        verify(found, "a", ROOT, TOKENS)
        consistent(store)
    statistics = store.statistics()
    assert statistics.file_blocks_read == 3, "the second time they are in memory"
    assert (statistics.hits, statistics.misses, statistics.stored_blocks) == (2, 3, 3)
    assert (statistics.damaged, statistics.files_stopped, statistics.crossings) == (0, None, 0)
    longer = [*TOKENS, 1, 2]
    assert store.add("a", ROOT, longer, telling("a", ROOT, longer)) == 1
    assert length(store_in(folder), longer, "a") == 4


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.bool]
)
def test_dtypes_shapes_and_order_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = [(torch.randn(shape) * 9).to(dtype) for shape in ((1, 2, 3, 5), (7,), (), (1, 2, 3, 5))] * 3
    store_in(tmp_path).add(None, ROOT, [1, 2], lambda start, stop: tensors)
    (block,) = store_in(tmp_path).match(None, ROOT, [1, 2])
    for found, expected in zip(block.tensors, tensors, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
        assert found.untyped_storage().nbytes() == expected.nbytes


def test_files_are_safetensors_that_name_neither_tenant_nor_tokens(tmp_path: Path) -> None:
    tokens = [123456789, 987654321]
    store = store_in(tmp_path)
    store.add("Secret Tenant", b"secret root", tokens, plain)
    (path,) = tmp_path.iterdir()
    assert [tensor.tolist() for tensor in load_file(path).values()] == [plain(0, 2)[0].tolist()]
    data = path.read_bytes()
    for secret in (b"ecret", b"123456789", *(token.to_bytes(8, "little") for token in tokens)):
        assert secret not in data
    assert path.stat().st_mode & 0o077 == 0


def test_every_altered_byte_and_every_truncation_is_a_miss(tmp_path: Path) -> None:
    store_in(tmp_path).add("a", ROOT, TOKENS[:2], plain)
    path = path_of(tmp_path, 0)
    whole = path.read_bytes()
    files = PrefixFiles(tmp_path)
    key = bytes.fromhex(path.name[:64])
    altered = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    altered += [whole[:at] for at in range(0, len(whole), 7)] + [whole + b"\0", bytes(len(whole)), whole * 2]
    for count, data in enumerate(altered, 1):
        path.write_bytes(data)
        assert files.read(key) is None
        assert not path.exists()
        assert files.damaged == count
    path.write_bytes(whole)
    assert files.read(key) is not None
    assert files.stopped is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_block_is_made_again(at: int, tmp_path: Path) -> None:
    filled(tmp_path)
    path = path_of(tmp_path, at)
    path.write_bytes(path.read_bytes()[:-3])
    store = store_in(tmp_path)
    assert length(store, TOKENS, "a") == at
    assert not path.exists()
    assert store.statistics().damaged == 1
    store.add("a", ROOT, TOKENS, telling("a", ROOT, TOKENS))
    verify(store.match("a", ROOT, TOKENS), "a", ROOT, TOKENS)
    assert length(store_in(tmp_path), TOKENS, "a") == 3


def test_a_file_under_another_name_is_not_served(tmp_path: Path) -> None:
    filled(tmp_path)
    shutil.copy(path_of(tmp_path, 0), path_of(tmp_path, 0, "b"))
    store = store_in(tmp_path)
    assert store.match("b", ROOT, TOKENS) == []
    assert (store.statistics().damaged, store.statistics().crossings) == (1, 0)


def test_a_file_of_another_tenant_is_refused_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where keys would not depend on the tenant."""
    filled(tmp_path)
    store = store_in(tmp_path)
    chain = store._chain
    monkeypatch.setattr(store, "_chain", lambda tenant, root, tokens: chain("a", root, tokens))
    assert store.match("b", ROOT, TOKENS) == []
    assert store.statistics().crossings == 1
    assert length(store, TOKENS, "a") == 3


def test_a_file_with_other_tokens_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    store = store_in(tmp_path)
    chain = store._chain("a", ROOT, TOKENS)
    monkeypatch.setattr(store, "_chain", lambda *_: [(key, packed[::-1]) for key, packed in chain])
    assert store.match("a", ROOT, TOKENS) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("when", ["open", "replace"])
def test_a_full_or_broken_disk_ends_persistence_only(
    code: int, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    place: Any = prefix_files if when == "open" else os
    monkeypatch.setattr(place, "_write" if when == "open" else "replace", fails_with(code))
    longer = [*TOKENS, 1, 2, 3, 4]
    assert store.add("a", ROOT, longer, telling("a", ROOT, longer)) == 2
    monkeypatch.undo()
    verify(store.match("a", ROOT, longer), "a", ROOT, longer)
    assert length(store, longer, "a") == 5
    assert store.statistics().files_stopped == f"{tmp_path} could not be written to: {os.strerror(code)}"
    assert store.statistics().file_blocks_written == 3
    assert not list(tmp_path.glob("*.part"))
    store.clear("a")
    assert length(store, TOKENS, "a") == 0
    assert not list(tmp_path.iterdir()), "what is to be deleted is deleted all the same"


def test_a_disk_that_fills_up_within_a_file_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)

    def half(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        fails_with(errno.ENOSPC)()

    monkeypatch.setattr(prefix_files, "_write", half)
    assert store.add("a", ROOT, TOKENS, plain) == 3
    assert not list(tmp_path.iterdir())
    assert "No space left" in str(store.statistics().files_stopped)


@pytest.mark.parametrize("by", ["match", "add"])
@pytest.mark.parametrize("instead", ["nothing", "file"])
def test_a_folder_that_vanishes_ends_persistence_only(by: str, instead: str, tmp_path: Path) -> None:
    store = filled(tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder")
    if instead == "file":
        (tmp_path / "folder").write_text("")
    longer = [*TOKENS, 1, 2]
    if by == "add":
        assert store.add("a", ROOT, longer, telling("a", ROOT, longer)) == 1
    found = store.match("a", ROOT, [*longer, 3, 4])
    assert len(found) == 3 + (by == "add")
    verify(found, "a", ROOT, longer)
    assert str(tmp_path / "folder") in str(store.statistics().files_stopped)
    store.clear()
    assert store.add("a", ROOT, longer, plain) == 4


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions bind no administrator")
def test_a_folder_that_becomes_read_only_ends_persistence_only(tmp_path: Path) -> None:
    store = filled(tmp_path)
    tmp_path.chmod(0o500)
    try:
        store.add("a", ROOT, [*TOKENS, 1, 2], plain)
        assert "could not be written" in str(store.statistics().files_stopped)
        with pytest.raises(ConfigError, match="cannot be kept"):
            PrefixFiles(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert length(store, [*TOKENS, 1, 2], "a") == 4


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ConfigError, match=r"cannot be kept in .*file.*Name a folder that this process may write to"
        ):
            PrefixFiles(folder)
    monkeypatch.setattr(prefix_files, "_write", fails_with(errno.EROFS))
    with pytest.raises(ConfigError, match="Read-only file system"):
        PrefixFiles(tmp_path / "readable")
    for wrong in (0, -1, True, 1.5, None):
        with pytest.raises(ConfigError, match=f"budget_bytes is a whole number, at least 1; {wrong!r} was given"):
            PrefixFiles(tmp_path, wrong)  # type: ignore[arg-type]


def test_tensors_that_no_file_can_hold_stay_in_memory(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with pytest.warns(UserWarning, match="ComplexHalf"):
        made = torch.zeros(3, dtype=torch.complex32)
    assert store.add("a", ROOT, TOKENS, lambda start, stop: [made]) == 3
    assert "complex32" in str(store.statistics().files_stopped)
    assert length(store, TOKENS, "a") == 3


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """The process is killed between writing a file and giving it its name."""
    script = """
import os, signal, sys, torch
from hf_accel.cache.prefix.files import PrefixFiles
from hf_accel.cache.prefix.store import PrefixStore
store = PrefixStore(10**6, 2, PrefixFiles(sys.argv[1]))
make = lambda start, stop: [torch.full((16,), start, dtype=torch.uint8)]
store.add("a", b"weights", [5, 6, 7, 8], make)
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.add("a", b"weights", [5, 6, 7, 8, 9, 10], make)
"""
    done = Running(script, tmp_path.with_suffix(".output"), tmp_path)
    assert done.wait(300) == -9, done.stderr
    (left,) = tmp_path.glob("*.part")
    elsewhere = left.with_name(left.name.replace(block_folder._machine(), "0" * 8))
    running = left.with_name(f"{left.name[:64]}.{os.getppid()}.{block_folder._machine()}.0.part")
    own = left.with_name(f"{left.name[:64]}.{os.getpid()}.{block_folder._machine()}.999.part")
    old = own.with_name(own.name.replace("999", "998"))
    foreign = tmp_path / "notes.part"
    for path in (elsewhere, running, own, old, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (time.time() - 3700, time.time() - 3700))
    store = store_in(tmp_path)
    assert {path for path in tmp_path.iterdir() if path.suffix == ".part"} == {elsewhere, running, own, foreign}
    assert [block.tensors[0][0].item() for block in store.match("a", ROOT, TOKENS)] == [0, 2]


def test_the_folder_has_a_budget_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    store = store_in(tmp_path, block_tokens=1)
    store.add("a", ROOT, [1], plain)
    size = next(tmp_path.iterdir()).stat().st_size
    store = store_in(tmp_path, block_tokens=1, files_budget=6 * size + 1)
    store.add("a", ROOT, [2, 3], plain)
    store.add("a", ROOT, [7, 8, 9], plain)
    assert length(store, [1], "a") == length(store, [2, 3, 4], "a") - 1 == 1
    for token in range(20, 23):
        store.add("a", ROOT, [token], plain)
        assert [path_of(tmp_path, at, tokens=[7, 8, 9], block_tokens=1).exists() for at in range(3)] == [
            token - 20 < 2 - at for at in range(3)
        ]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 6 * size
        store.match("a", ROOT, [2])  # in memory: the file counts as used nevertheless
    fresh = store_in(tmp_path, block_tokens=1)
    assert [length(fresh, tokens, "a") for tokens in ([1], [2, 3], [7, 8, 9], [22])] == [1, 2, 0, 1]
    assert store.statistics().file_blocks_deleted == 3
    smaller = store_in(tmp_path, files_budget=size - 1)
    assert smaller.add("b", ROOT, TOKENS, plain) == 3, "kept in memory"
    assert not list(tmp_path.iterdir())


def test_what_another_process_uses_is_not_deleted_first(tmp_path: Path) -> None:
    store = store_in(tmp_path, block_tokens=1)
    for token in range(4):
        store.add("a", ROOT, [token], plain)
    size = next(tmp_path.iterdir()).stat().st_size
    assert store.files is not None
    store.files.blocks.budget_bytes, store.files.blocks.next_scan = 4 * size, time.monotonic() + 100
    assert length(store_in(tmp_path, block_tokens=1), [0], "a") == 1  # the other one
    store.add("a", ROOT, [9], plain)
    fresh = store_in(tmp_path, block_tokens=1)
    assert [length(fresh, [token], "a") for token in (0, 1, 2, 3, 9)] == [1, 0, 1, 1, 1]


def test_chains_longer_than_memory_are_served_from_files(tmp_path: Path) -> None:
    filled(tmp_path, block_tokens=1)
    store = store_in(tmp_path, budget=1, block_tokens=1)
    verify(store.match("a", ROOT, TOKENS), "a", ROOT, TOKENS)
    assert length(store, TOKENS, "a") == 6
    assert store.statistics().bytes == 0
    consistent(store)


def test_clearing_a_tenant_deletes_its_files_and_no_others(tmp_path: Path) -> None:
    for tenant in ("a", None, "b"):
        filled(tmp_path, tenant)
    path_of(tmp_path, 0, "b").write_bytes(b"damaged")  # whose it is cannot be told
    (tmp_path / "notes.txt").write_text("")
    store = store_in(tmp_path)
    store.clear("a")
    assert [length(store_in(tmp_path), TOKENS, tenant) for tenant in ("a", None, "b")] == [0, 3, 0]
    assert len(list(tmp_path.iterdir())) == 3 + 2 + 1
    store.clear(None)
    assert len(list(tmp_path.iterdir())) == 2 + 1
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_block_written_while_its_tenant_is_cleared_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    assert store.files is not None
    write = store.files.write

    def clear_first(*given: Any) -> bool:
        store.clear("a")
        return write(*given)

    monkeypatch.setattr(store.files, "write", clear_first)
    assert store.add("a", ROOT, TOKENS, plain) == 1
    assert not list(tmp_path.iterdir())


def test_a_block_read_while_its_tenant_is_cleared_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    store = store_in(tmp_path)
    assert store.files is not None
    read = store.files.read

    def clear_after(key: bytes) -> Any:
        record = read(key)
        if record is not None:
            store.clear("a")
        return record

    monkeypatch.setattr(store.files, "read", clear_after)
    verify(store.match("a", ROOT, TOKENS), "a", ROOT, TOKENS)
    assert length(store, TOKENS, "a") == store.statistics().stored_blocks == 0
    consistent(store)


def test_two_stores_in_one_folder(tmp_path: Path) -> None:
    """Threads of two stores, with too little room in memory and in the folder, and a hand that damages files."""
    stores = [store_in(tmp_path, budget=500, files_budget=8000) for _ in range(2)]

    def work(number: int) -> None:
        store, tenant = stores[number % 2], "ab"[number // 4]
        for at in range(30):
            tokens = [(at + number) % 3, 1, at % 2, 1, 1, 1, number % 2, 0]
            verify(store.match(tenant, ROOT, tokens), tenant, ROOT, tokens)
            store.add(tenant, ROOT, tokens, telling(tenant, ROOT, tokens))
            if number == 0 and at % 5 == 0:
                for path in list(tmp_path.glob("*.safetensors"))[:2]:
                    if path.exists():
                        path.write_bytes(b"x" * 300)

    together(work)
    for store in stores:
        consistent(store)
        assert store.statistics().files_stopped is None
    assert sum(store.statistics().file_blocks_read for store in stores) > 0
    assert not list(tmp_path.glob("*.part"))
