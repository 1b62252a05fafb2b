"""Key/value blocks of prompts as files, so that they outlive the process and other processes find them.

One safetensors file per block, named by the block's key: neither tenant nor tokens are in it, keys and values are.
Every byte is under a BLAKE2b checksum against damage, not against forgery: who may write to the folder decides what is
generated, so a folder that others may write to is refused, and a file that is not this user's own left alone.
Cost: a file and its checksum per block, on two shared cores 4 ms per MiB read and 10 ms per MiB written.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hf_accel.cache.prefix.folder import BlockFolder, mark, stat_of
from hf_accel.cache.prefix.format import BlockFile, encode, read_block, read_owner
from hf_accel.cache.prefix.owned import distrust, make_folder, open_own
from hf_accel.errors import CheckpointError, ConfigError


class PrefixFiles:
    """Blocks in a folder that several processes may share; any thread may call any method at any time.

    If the folder cannot be used any more, `stopped` says why, and from then on nothing is found and nothing written.
    """

    def __init__(self, folder: str | os.PathLike[str], budget_bytes: int = 8 << 30) -> None:
        """Create the folder if need be, try to write to it, and remove what killed processes left unfinished.

        Raises:
            ConfigError: the folder cannot be written, or others may write to it; or budget_bytes is no whole number
                of at least 1.
        """
        if type(budget_bytes) is not int or budget_bytes < 1:
            raise ConfigError(f"budget_bytes is a whole number, at least 1; {budget_bytes!r} was given.")
        self.folder = Path(folder).absolute()
        self.stopped: str | None = None
        self.read_blocks = self.written_blocks = self.damaged = self.refused = 0
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self.blocks = BlockFolder(self.folder, budget_bytes)
        try:
            make_folder(self.folder)
            reason = distrust(self.folder)
            if reason is None:
                probe = self.blocks.partial_of(bytes(32))
                _write(probe, b"")
                probe.unlink()
                self.blocks.remove_leftovers()
                self.blocks.make_room(0)
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

    @property
    def deleted_blocks(self) -> int:
        """How many files were deleted for the budget."""
        return self.blocks.deleted

    def read(self, key: bytes) -> BlockFile | None:
        """Return the block of a key (32 bytes), None if there is none.

        A damaged file is deleted and counted; what is no regular file, or another user's, is left alone and counted.
        """
        if not self._is_trusted("read from"):
            return None
        try:
            file = open_own(self.blocks.path_of(key))
            if file is None:
                self._count("refused")
                return None
            with file:
                block = read_block(file, key, self.blocks.budget_bytes)
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
        return block

    def write(self, key: bytes, owner: str, tokens: str, tensors: Sequence[torch.Tensor], depth: int) -> bool:
        """Write a block, the `depth`-th of its chain, unless there is one; return whether it was written.

        `owner` and `tokens` are digests that `read` returns; tensors are contiguous and share no memory.
        """
        if not self._is_trusted("written to"):
            return False
        path, partial = self.blocks.path_of(key), self.blocks.partial_of(key)
        try:
            data = encode(key, owner, tokens, tensors)
            with self._writing:
                if stat_of(path) is not None or path.is_dir() or len(data) > self.blocks.budget_bytes:
                    return False
                self.blocks.make_room(len(data))
                try:
                    _write(partial, data)
                    stamp = mark(partial, time.time_ns(), depth)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
                self.blocks.note(path, stamp, len(data))
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
                mark(self.blocks.path_of(key), now, depth)
            except FileNotFoundError:
                continue  # deleted for the budget; it may still be in memory
            except OSError as error:
                self._stop("written to", error)

    def remove(self, key: bytes) -> None:
        """Delete the file of a key, if there is one."""
        try:
            self.blocks.path_of(key).unlink(missing_ok=True)
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
            for name in self.blocks.list_blocks():
                path = self.folder / name
                if owner_of is None or _owner_in(path) in (None, owner_of(bytes.fromhex(name[:64]))):
                    path.unlink(missing_ok=True)
                    self.blocks.forget(name)

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
