"""Prefix files that others could have written, or that are none: never read, never waited for, and counted."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_calls import shared, stock
from models import build, prompt
from test_prefix_files import TOKENS, filled, path_of, store_in
from test_prefixes import ROOT, telling, verify

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.cache.prefix import files as prefix_files
from hf_accel.cache.prefix import owned
from hf_accel.cache.prefix.files import PrefixFiles
from hf_accel.cache.prefix.format import LARGEST_HEAD
from hf_accel.cache.tiers.spill import Spill
from hf_accel.errors import ConfigError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners, modes and pipes of POSIX")


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link(path: Path) -> None:
    """The very block, behind a link."""
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("")


def as_writable_by_others(path: Path) -> None:
    path.chmod(0o666)


def as_huge(path: Path) -> None:
    """Four terabytes, none of which is on the disk: reading it would end the process."""
    os.truncate(path, 1 << 42)


def as_huge_hole(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 1 << 42)


def as_huge_head(path: Path) -> None:
    path.write_bytes((1 << 41).to_bytes(8, "little"))
    os.truncate(path, 1 << 42)


def as_huge_block(path: Path) -> None:
    """A head that is as it should be for so much."""
    size = (1 << 42) - 1024
    head = f'{{"__metadata__":{{"checksum":"{"0" * 64}"}},"000000":{{"dtype":"U8","shape":[{size}],'
    head += f'"data_offsets":[0,{size}]}}}}'
    path.write_bytes((1016).to_bytes(8, "little") + head.ljust(1016).encode())
    os.truncate(path, 1 << 42)


def as_deep_head(path: Path) -> None:
    head = b"[" * (LARGEST_HEAD // 2)
    path.write_bytes(len(head).to_bytes(8, "little") + head)


REFUSED = [as_fifo, as_link, as_dangling_link, as_device, as_socket, as_folder, as_writable_by_others]
DAMAGED = [as_huge, as_huge_hole, as_huge_head, as_huge_block, as_deep_head]


@pytest.mark.parametrize("change", [*REFUSED, *DAMAGED])
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_no_file_of_this_user(change: Callable[[Path], None], at: int, tmp_path: Path) -> None:
    filled(tmp_path)
    path, store = path_of(tmp_path, at), store_in(tmp_path)
    change(path)
    found = store.match("a", ROOT, TOKENS)
    verify(found, "a", ROOT, TOKENS)
    counts = store.statistics()
    assert (len(found), counts.files_stopped) == (at, None)
    assert (counts.refused, counts.damaged) == ((1, 0) if change in REFUSED else (0, 1))
    assert os.path.lexists(path) == (change in REFUSED)
    store.add("a", ROOT, TOKENS, telling("a", ROOT, TOKENS))
    again = store_in(tmp_path)
    is_mended = change is not as_folder  # nothing can be put in its place
    assert len(again.match("a", ROOT, TOKENS)) == (3 if is_mended else at)
    assert store.statistics().files_stopped is None
    if (tmp_path / "elsewhere").exists():
        assert (tmp_path / "elsewhere").stat().st_size, "what a link points to is left as it is"
    store.clear("a")
    store.clear()
    assert not [path for path in tmp_path.glob("*.safetensors") if not path.is_dir()]


def always(path: Path) -> Any:
    return open(path, "rb")


@pytest.mark.parametrize("change", [as_link, as_writable_by_others])
def test_a_planted_reader_of_anything_is_seen(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_files, "open_own", always)
    with pytest.raises(AssertionError):
        test_what_is_no_file_of_this_user(change, 0, tmp_path)


@pytest.fixture
def as_another(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes this process another user's, from the moment of the call on."""
    another = os.geteuid() + 1
    return lambda: monkeypatch.setattr(owned.os, "geteuid", lambda: another)


def test_files_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is this user's, one file in it is not."""
    filled(tmp_path)
    path = path_of(tmp_path, 1)
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
    else:
        foreign, fstat = path.stat().st_ino, os.fstat

        def of_another(file: int) -> Any:
            found = fstat(file)
            return os.stat_result([*found[:4], found.st_uid + 1, *found[5:]]) if found.st_ino == foreign else found

        monkeypatch.setattr(owned.os, "fstat", of_another)
    store = store_in(tmp_path)
    assert len(store.match("a", ROOT, TOKENS)) == 1
    assert (store.statistics().refused, store.statistics().files_stopped) == (1, None)
    assert path.exists()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o720, 0o702, 0o2770])
def test_a_folder_that_others_may_write_to(mode: int, tmp_path: Path) -> None:
    store = filled(tmp_path / "folder")
    folder = tmp_path / "folder"
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"folder, .*others may write to it .*{mode:04o}.*chmod go-w.*another"):
        PrefixFiles(folder)
    assert len(store.match("a", ROOT, TOKENS)) == 3, "memory is not concerned"
    longer = [*TOKENS, 1, 2]
    store.add("a", ROOT, longer, telling("a", ROOT, longer))
    assert "others may write to it" in str(store.statistics().files_stopped)
    assert store.statistics().file_blocks_written == 3
    folder.chmod(0o755)
    assert len(store_in(folder).match("a", ROOT, longer)) == 3


def test_a_folder_that_others_may_write_to_from_now_on_is_not_read(tmp_path: Path) -> None:
    filled(tmp_path)
    store = store_in(tmp_path)
    tmp_path.chmod(0o777)
    assert store.match("a", ROOT, TOKENS) == []
    assert "others may write to it" in str(store.statistics().files_stopped)


def test_a_folder_of_another_user(tmp_path: Path, as_another: Callable[[], None]) -> None:
    filled(tmp_path)
    store = store_in(tmp_path)
    as_another()
    with pytest.raises(ConfigError, match=r"belongs to another user.*Name a folder of your own"):
        PrefixFiles(tmp_path)
    assert store.match("a", ROOT, TOKENS) == []
    assert "another user" in str(store.statistics().files_stopped)


def test_links_to_a_folder(tmp_path: Path) -> None:
    filled(tmp_path / "folder")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder")
    assert len(store_in(link).match("a", ROOT, TOKENS)) == 3
    if os.geteuid() == 0:
        os.lchown(link, 4321, 4321)
        with pytest.raises(ConfigError, match=r"a link that belongs to another user .*Name the folder itself"):
            PrefixFiles(link)


@pytest.mark.parametrize("instead", ["fifo", "dangling link", "null byte", "surrogate"])
def test_names_of_no_folder(instead: str, tmp_path: Path) -> None:
    path = str(tmp_path / "folder")
    if instead == "fifo":
        os.mkfifo(path)
    elif instead == "dangling link":
        Path(path).symlink_to(tmp_path / "nothing")
    else:
        path += "\0" if instead == "null byte" else "\ud800"
    for make in (PrefixFiles, Spill):
        with pytest.raises(ConfigError, match="folder"):
            make(path)


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_every_new_folder_is_this_users_alone(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        filled(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    made = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
    assert {path.stat().st_mode & 0o777 for path in made[-1].iterdir()} == {0o600}


def test_a_folder_named_from_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = filled(Path("folder"))
    monkeypatch.chdir("/")
    longer = [*TOKENS, 1, 2]
    assert store.add("a", ROOT, longer, telling("a", ROOT, longer)) == 1
    assert len(list((tmp_path / "folder").iterdir())) == 4


def test_a_file_larger_than_the_budget_makes_nothing_else_go(tmp_path: Path) -> None:
    filled(tmp_path)
    as_huge(path_of(tmp_path, 1))
    os.utime(path_of(tmp_path, 1))
    store = store_in(tmp_path)
    assert len(store.match("a", ROOT, TOKENS)) == 1
    assert [path_of(tmp_path, at).exists() for at in range(3)] == [True, False, True]


# ---- whole calls

IDS = prompt(1, 150)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), AttentionConfig(), KVCacheConfig()])
    yield model
    hf_accel.restore(model)


def ask(model: Any, **given: Any) -> Any:
    return model.generate(IDS, max_new_tokens=8, do_sample=False, **given)


def reusing(folder: Path) -> KVCacheConfig:
    return KVCacheConfig(prefix_reuse=True, prefix_folder=str(folder))


def test_a_call_that_names_a_folder_of_everybodys(model: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        ask(model, kv_cache=reusing(tmp_path))
    tmp_path.chmod(0o700)
    assert torch.equal(ask(model, kv_cache=reusing(tmp_path)), ask(stock("llama")))


def harm(path: Path, dice: random.Random, others: list[bytes]) -> None:
    """Damage a file, or put something else in its place."""
    data = bytearray(path.read_bytes())
    one, other = sorted(dice.randrange(len(data)) for _ in range(2))
    span = min(dice.choice([1, 8, 512, 4096]), other - one, len(data) - other)
    act = dice.randrange(10)
    if act == 0:
        data[one] ^= 1 << dice.randrange(8)
    elif act == 1 and span:
        data[one : one + span], data[other : other + span] = data[other : other + span], data[one : one + span]
    elif act == 2:
        data[one:other] = bytes(other - one)
    elif act == 3:
        data = data[:one]
    elif act == 4:
        data[one:one] = data[one:other]
    elif act == 5:
        del data[one : other + 1]
    elif act == 6:
        data[8:200] = dice.randbytes(192)
    elif act == 7:
        data = bytearray(dice.choice(others))
    elif act == 8:
        return dice.choice([*REFUSED, *DAMAGED])(path)
    else:
        data[:8] = dice.choice([0, 1, 9, 1 << 20, 1 << 40, (1 << 64) - 1]).to_bytes(8, "little")
    path.write_bytes(data)
    return None


def fuzz(seeds: range, folder: Path) -> None:
    """What is found is what was stored, or less of it; folder and store go on being of use."""
    unharmed = 0
    for seed in seeds:
        dice = random.Random(seed)
        place = folder / str(seed)
        filled(place)
        files = [path_of(place, at) for at in range(3)]
        before = [path.read_bytes() for path in files]
        for path in dice.sample(files, dice.randrange(1, 3)):
            harm(path, dice, before)
        store = store_in(place)
        found = store.match("a", ROOT, TOKENS)
        verify(found, "a", ROOT, TOKENS)
        unharmed += len(found)
        for at in range(len(found)):
            assert files[at].read_bytes() == before[at]
        store.add("a", ROOT, TOKENS, telling("a", ROOT, TOKENS))
        verify(store_in(place).match("a", ROOT, TOKENS), "a", ROOT, TOKENS)
        assert store.statistics().files_stopped is None
    assert len(seeds) // 4 < unharmed < 2 * len(seeds)


def test_damage_of_many_kinds(tmp_path: Path) -> None:
    fuzz(range(150), tmp_path)


@pytest.mark.slow
def test_much_damage_of_many_kinds(tmp_path: Path) -> None:
    fuzz(range(1000, 11_000), tmp_path)


def test_calls_over_damaged_files(model: Any, tmp_path: Path) -> None:
    expected = ask(stock("llama"))
    for seed in range(12):
        folder = tmp_path / str(seed)
        config = reusing(folder)
        ask(model, kv_cache=config)
        files = sorted(folder.iterdir())
        assert len(files) == 2
        before = [path.read_bytes() for path in files]
        for path in files:
            harm(path, random.Random(seed), before)
        # another model of the same weights: nothing of it is in memory
        with hf_accel.optimized(build("llama"), [DecodingConfig(), AttentionConfig(), config]) as other:
            assert torch.equal(ask(other), expected)
            assert torch.equal(ask(other), expected)
    assert torch.equal(ask(shared("llama")), expected)
