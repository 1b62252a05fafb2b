"""Key/value blocks of prompts as files, so that they outlive the process and other processes find them.

One safetensors file per block, named by the block's key: neither tenant nor tokens are in it, keys and values are.
Every byte is under a BLAKE2b checksum against damage, not against forgery: who may write to the folder decides what is
generated, so a folder that others may write to is refused, and a file that is not this user's own left alone.
Files written or found least recently are deleted first, whoever their tenant is.
Cost: a file and its checksum per block, on two shared cores 4 ms per MiB read and 10 ms per MiB written; before
writing, the folder is listed at most every second and for at most a twentieth of the time.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hf_accel.cache.prefix.format import FORMAT, Record, encode, read_block, read_owner
from hf_accel.cache.prefix.owned import distrust, is_own, make_folder, open_own
from hf_accel.errors import CheckpointError, ConfigError

LEFTOVER_SECONDS = 3600.0

_BLOCK = re.compile(r"[0-9a-f]{64}\.\d+\.safetensors")  # of every format: all are under the budget
_PARTIAL = re.compile(r"[0-9a-f]{64}\.(\d+)\.([0-9a-f]{8})\.\d+\.part")
# not from 0: a process that was killed may have had the same id, and left a file of the same name
_NUMBERS = itertools.count(secrets.randbits(48))


class PrefixFiles:
    """Blocks in a folder that several processes may share; any thread may call any method at any time.

    If the folder cannot be used any more, `stopped` says why, and from then on nothing is found and nothing written.
    With several processes the folder can exceed the budget by what the others write within a second.
    """

    def __init__(self, folder: str | os.PathLike[str], budget_bytes: int = 8 << 30) -> None:
        """Create the folder if need be, try to write to it, and remove what killed processes left unfinished.

        Raises:
            ConfigError: the folder cannot be written, or others may write to it; or budget_bytes is no whole number
                of at least 1.
        """
        if type(budget_bytes) is not int or budget_bytes < 1:
            raise ConfigError(f"budget_bytes is a whole number, at least 1; {budget_bytes!r} was given.")
        self.folder, self.budget_bytes = Path(folder).absolute(), budget_bytes
        self.stopped: str | None = None
        self.read_blocks = self.written_blocks = self.deleted_blocks = self.damaged = self.refused = 0
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._known: dict[str, tuple[int, int]] = {}  # name: last access in ns, bytes; as of the last look
        self._next_scan = 0.0
        try:
            make_folder(self.folder)
            reason = distrust(self.folder)
            if reason is None:
                probe = self._partial(bytes(32))
                _write(probe, b"")
                probe.unlink()
                self._remove_leftovers()
                self._make_room(0)
        except (OSError, ValueError) as error:  # ValueError: what can be no path
            raise ConfigError(
                f"Blocks of prompts cannot be kept in {self.folder}: {getattr(error, 'strerror', None) or error}. "
                "Name a folder that this process may write to, or none to keep them in memory only."
            ) from error
        if reason is not None:
            raise ConfigError(
                f"Blocks of prompts are not kept in {self.folder}, for who may write there decides what is "
                f"generated: {reason}."
            )

    def read(self, key: bytes) -> Record | None:
        """Return the block of a key (32 bytes), None if there is none.

        A damaged file is deleted and counted; what is no regular file, or another user's, is left alone and counted.
        """
        if not self._is_trusted("read from"):
            return None
        try:
            file = open_own(self._path(key))
            if file is None:
                self._count("refused")
                return None
            with file:
                record = read_block(file, key, self.budget_bytes)
        except FileNotFoundError:
            if not self.folder.is_dir():
                self._stop("read from", "the folder is gone")
            return None
        except OSError as error:
            self._stop("read from", error)
            return None
        except CheckpointError:
            self._count("damaged")
            self.remove(key)
            return None
        self._count("read_blocks")
        return record

    def write(self, key: bytes, owner: str, tokens: str, tensors: Sequence[torch.Tensor], depth: int) -> bool:
        """Write a block, the `depth`-th of its chain, unless there is one; return whether it was written.

        `owner` and `tokens` are digests that `read` returns; tensors are contiguous and share no memory.
        """
        if not self._is_trusted("written to"):
            return False
        path, partial = self._path(key), self._partial(key)
        try:
            data = encode(key, owner, tokens, tensors)
            with self._writing:
                if _stat(path) is not None or path.is_dir() or len(data) > self.budget_bytes:
                    return False
                self._make_room(len(data))
                try:
                    _write(partial, data)
                    stamp = _mark(partial, time.time_ns(), depth)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
                self._known[path.name] = stamp, len(data)
        except (OSError, CheckpointError) as error:
            self._stop("written to", error)
            return False
        self._count("written_blocks")
        return True

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark the first blocks of a chain as used now; the deepest will be deleted first."""
        now = time.time_ns()
        for depth, key in enumerate(keys):
            if self.stopped is not None:
                return
            try:
                _mark(self._path(key), now, depth)
            except FileNotFoundError:
                continue  # deleted for the budget; it may still be in memory
            except OSError as error:
                self._stop("written to", error)

    def remove(self, key: bytes) -> None:
        """Delete the file of a key, if there is one."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._stop("written to", error)

    def clear(self, owner_of: Callable[[bytes], str] | None = None) -> None:
        """Delete all blocks, or those whose owner is what `owner_of` says for their key; also of other processes.

        Raises:
            OSError: a file could not be deleted; it names the file.
        """
        if not self.folder.is_dir():
            return
        with self._writing:
            for name in self._list():
                path = self.folder / name
                if owner_of is None or _owner_in(path) in (None, owner_of(bytes.fromhex(name[:64]))):
                    path.unlink(missing_ok=True)
                    self._known.pop(name, None)

    def _make_room(self, size: int) -> None:
        """Delete what was used longest ago until `size` more bytes fit; the caller holds `_writing`."""
        if time.monotonic() >= self._next_scan:
            began = time.monotonic()
            self._known = self._list()
            self._next_scan = time.monotonic() + max(1.0, 20 * (time.monotonic() - began))
        total = sum(weight for _, weight in self._known.values())
        while total + size > self.budget_bytes and self._known:
            # what is larger than the budget is not ours, whatever its name
            name = min(self._known, key=lambda known: (self._known[known][1] <= self.budget_bytes, self._known[known]))
            stamp, weight = self._known[name]
            found = _stat(self.folder / name)
            if found is not None and found[0] != stamp:  # used since
                self._known[name] = found
                total += found[1] - weight
                continue
            (self.folder / name).unlink(missing_ok=True)
            del self._known[name]
            total -= weight
            self._count("deleted_blocks")

    def _list(self) -> dict[str, tuple[int, int]]:
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _BLOCK.fullmatch(entry.name) and (known := _stat(entry.path)) is not None:
                    found[entry.name] = known
        return found

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            known = _stat(path) if match else None
            if match is None or known is None:
                continue
            is_old = time.time_ns() - known[0] > LEFTOVER_SECONDS * 1e9
            if is_old or (match[2] == _machine() and not _is_alive(int(match[1]))):
                path.unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.{FORMAT}.safetensors"

    def _partial(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.{os.getpid()}.{_machine()}.{next(_NUMBERS)}.part"

    def _is_trusted(self, what: str) -> bool:
        """Whether the folder may be used. It is looked at every time: modes change, and so does what has its name."""
        if self.stopped is None:
            try:
                reason = distrust(self.folder)
            except OSError:
                reason = None  # what it is to be used for will tell
            if reason is not None:
                self._stop(what, reason)
        return self.stopped is None

    def _count(self, name: str) -> None:
        with self._counting:
            setattr(self, name, getattr(self, name) + 1)

    def _stop(self, what: str, why: object) -> None:
        with self._counting:
            if self.stopped is None:
                why = getattr(why, "strerror", None) or why
                self.stopped = f"{self.folder} could not be {what}: {why}"


def _owner_in(path: Path) -> str | None:
    """Return the owner that the head of a file names, None if it names none."""
    try:
        file = open_own(path)
        if file is None:
            return None
        with file:
            return read_owner(file)
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    # for this user only: keys and values tell what was in the prompt
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "wb") as file:
        file.write(data)


def _mark(path: Path, now: int, depth: int) -> int:
    """Mark a file as used `now`, in ns; deeper ones as used earlier, so that the first of a chain is deleted last."""
    stamp = now - 1000 * depth
    os.utime(path, ns=(stamp, stamp), follow_symlinks=os.utime not in os.supports_follow_symlinks)
    return stamp


def _stat(path: str | Path) -> tuple[int, int] | None:
    """Return the last access in ns and the bytes of a file, None if there is no file or it is not this user's own."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return (found.st_mtime_ns, found.st_size) if is_own(found) else None


def _machine() -> str:
    """Return what tells machines that share a folder apart: process ids of another say nothing here."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
