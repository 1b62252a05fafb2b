"""The folder of the blocks' files: their names, when each was used last, its budget, and what killed processes left.

Files written or found least recently are deleted first, whoever their tenant is. Cost: the folder is listed at most
every second and for at most a twentieth of the time.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import re
import secrets
import time
from pathlib import Path

from hf_accel.cache.prefix.format import FORMAT
from hf_accel.cache.prefix.owned import is_own

LEFTOVER_SECONDS = 3600.0

_BLOCK = re.compile(r"[0-9a-f]{64}\.\d+\.safetensors")  # of every format: all are under the budget
_PARTIAL = re.compile(r"[0-9a-f]{64}\.(\d+)\.([0-9a-f]{8})\.\d+\.part")
# not from 0: a process that was killed may have had the same id, and left a file of the same name
_NUMBERS = itertools.count(secrets.randbits(48))


class BlockFolder:
    """What lies in a folder of at most `budget_bytes`; whoever changes it holds a lock, and other processes may too.

    With several processes the folder can exceed the budget by what the others write within a second.
    """

    def __init__(self, path: Path, budget_bytes: int) -> None:
        self.path, self.budget_bytes = path, budget_bytes
        self.deleted = 0  # files, for the budget
        self.next_scan = 0.0
        self._known: dict[str, tuple[int, int]] = {}  # name: last access in ns, bytes; as of the last look

    def path_of(self, key: bytes) -> Path:
        """Return where the block of a key is."""
        return self.path / f"{key.hex()}.{FORMAT}.safetensors"

    def partial_of(self, key: bytes) -> Path:
        """Return a new name for a block that is being written."""
        return self.path / f"{key.hex()}.{os.getpid()}.{_machine()}.{next(_NUMBERS)}.part"

    def note(self, path: Path, stamp: int, size: int) -> None:
        """Take in that a block was written."""
        self._known[path.name] = stamp, size

    def forget(self, name: str) -> None:
        """Take in that a block was deleted."""
        self._known.pop(name, None)

    def make_room(self, size: int) -> None:
        """Delete what was used longest ago until `size` more bytes fit."""
        if time.monotonic() >= self.next_scan:
            began = time.monotonic()
            self._known = self.list_blocks()
            self.next_scan = time.monotonic() + max(1.0, 20 * (time.monotonic() - began))
        total = sum(weight for _, weight in self._known.values())
        while total + size > self.budget_bytes and self._known:
            # what is larger than the budget is not ours, whatever its name
            name = min(self._known, key=lambda known: (self._known[known][1] <= self.budget_bytes, self._known[known]))
            stamp, weight = self._known[name]
            found = stat_of(self.path / name)
            if found is not None and found[0] != stamp:  # used since
                self._known[name] = found
                total += found[1] - weight
                continue
            (self.path / name).unlink(missing_ok=True)
            del self._known[name]
            total -= weight
            self.deleted += 1

    def list_blocks(self) -> dict[str, tuple[int, int]]:
        """Return last access in ns and bytes of every block, by name."""
        found = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if _BLOCK.fullmatch(entry.name) and (known := stat_of(entry.path)) is not None:
                    found[entry.name] = known
        return found

    def remove_leftovers(self) -> None:
        """Delete what processes left unfinished that are no more, or that nobody has written to for an hour."""
        for path in self.path.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            known = stat_of(path) if match else None
            if match is None or known is None:
                continue
            is_old = time.time_ns() - known[0] > LEFTOVER_SECONDS * 1e9
            if is_old or (match[2] == _machine() and not _is_alive(int(match[1]))):
                path.unlink(missing_ok=True)


def mark(path: Path, now: int, depth: int) -> int:
    """Mark a file as used `now`, in ns; deeper ones as used earlier, so that the first of a chain is deleted last."""
    stamp = now - 1000 * depth
    os.utime(path, ns=(stamp, stamp), follow_symlinks=os.utime not in os.supports_follow_symlinks)
    return stamp


def stat_of(path: str | Path) -> tuple[int, int] | None:
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
