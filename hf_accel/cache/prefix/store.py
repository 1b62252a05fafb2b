"""Key/value blocks of prompts kept between calls, so that a prompt that begins the same is not computed again.

Blocks are found by a hash chain, as in the automatic prefix caching of vLLM (Kwon et al., 2023, arXiv:2309.06180).
Cost: a few microseconds per block of the prompt, and the memory of the blocks, which has a bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import EllipsisType

import torch

from hf_accel.cache.prefix.chain import Chain, chain_of, check_tenant, owner_digest, tokens_digest
from hf_accel.cache.prefix.counts import Counters, PrefixCounts, PrefixStatistics
from hf_accel.cache.prefix.files import PrefixFiles
from hf_accel.cache.prefix.shelf import PrefixBlock, Shelves
from hf_accel.errors import ConfigError


class PrefixStore:
    """Blocks of at most `budget_bytes`, found by tenant, by `root` and by the tokens from the first on.

    `root` stands for all else that keys and values depend on: weights, dtype, layout of the cache. None is a tenant
    like any other. Each tenant has a table of its own, so that what one stored is neither seen by another nor changes
    how long a look takes. Any thread may call any method at any time.

    When there is no room, `Shelves` says who gives up what.
    """

    def __init__(self, budget_bytes: int, block_tokens: int = 64, files: PrefixFiles | None = None) -> None:
        """Keep at most `budget_bytes` bytes of tensors, in blocks of `block_tokens` tokens; and a copy in `files`.

        Raises:
            ConfigError: one of the numbers is no whole number of at least 1.
        """
        for name, value in (("budget_bytes", budget_bytes), ("block_tokens", block_tokens)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is a whole number, at least 1; {value!r} was given.")
        self.block_tokens, self.files = block_tokens, files
        self._counters = Counters()
        self._shelves = Shelves(budget_bytes, self._counters)
        self._clears = 0
        self._lock = threading.Lock()

    @property
    def budget_bytes(self) -> int:
        return self._shelves.budget_bytes

    def resize(self, budget_bytes: int) -> None:
        """Keep at most `budget_bytes` from now on: calls with budgets of their own share what they store."""
        with self._lock:
            self._shelves.resize(budget_bytes)

    def match(self, tenant: str | None, root: bytes, tokens: Sequence[int]) -> list[PrefixBlock]:
        """Return the longest stored chain of whole blocks that `tokens` begin with, and mark it as used.

        Raises:
            ConfigError: the tenant is neither a string nor None, or the root is not bytes.
        """
        chain = self._chain(tenant, root, tokens)
        with self._lock:
            began, found = self._clears, self._shelves.find(tenant, chain)
        while self.files is not None and len(found) < len(chain):
            block = self._load(self.files, tenant, *chain[len(found)], len(found))
            if block is None:
                break
            with self._lock:
                if self._clears == began:
                    self._shelves.insert(tenant, chain, len(found), block)
            found.append(block)
        with self._lock:
            self._shelves.touch(tenant, chain[: len(found)])
            self._counters.add(tenant, hits=bool(found), misses=not found)
        if self.files is not None:
            self.files.touch([key for key, _ in chain[: len(found)]])
        return found

    def count_reused(self, tenant: str | None, tokens: int) -> None:
        """Note how many tokens of what `match` returned were made use of: rows of a batch take equally many columns."""
        with self._lock:
            self._counters.add(tenant, reused_tokens=tokens)

    def add(
        self,
        tenant: str | None,
        root: bytes,
        tokens: Sequence[int],
        make: Callable[[int, int], Sequence[torch.Tensor]],
    ) -> int:
        """Store the whole blocks of `tokens` that are not there yet; return how many were stored.

        `make(start, stop)` is called for each of them, in order, and returns the tensors of these positions: any
        number, of any shape and dtype. They are copied, and may be views of larger buffers. It may call the store. The
        first block that finds no room, or has no bytes, ends the chain. Beside the budget each call holds one block.

        Raises:
            ConfigError: the tenant is neither a string nor None, or the root is not bytes.
        """
        chain, stored = self._chain(tenant, root, tokens), 0
        with self._lock:
            began, held = self._clears, len(self._shelves.find(tenant, chain))
            self._shelves.touch(tenant, chain[:held])
        for at, (key, packed) in enumerate(chain[held:], held):
            with self._lock:
                if self._shelves.holds(tenant, key):  # added by another thread meanwhile
                    continue
            start, stop = at * self.block_tokens, (at + 1) * self.block_tokens
            made = make(start, stop)
            if not 0 < sum(tensor.nbytes for tensor in made) <= self.budget_bytes:
                break
            # views would keep their whole buffers in memory, and be overwritten with them
            own = tuple(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in made)
            block = PrefixBlock(tenant, start, stop, packed, own)
            with self._lock:
                is_new = self._clears == began and self._shelves.insert(tenant, chain, at, block)
                if not self._shelves.holds(tenant, key):
                    break
            stored += is_new
            if is_new and self.files is not None:
                self.files.write(key, owner_digest(key, tenant), tokens_digest(packed), block.tensors, at)
                with self._lock:
                    is_cleared = self._clears != began
                if is_cleared:  # after which nothing from before may come back
                    self.files.remove(key)
        if self.files is not None:
            self.files.touch([key for key, _ in chain[: held + stored]])
        return stored

    def clear(self, tenant: str | EllipsisType | None = ...) -> None:
        """Drop the blocks of one tenant, or without an argument of all, from memory and from the folder of `files`.

        Calls of `add` under way store nothing more. Other processes that share the folder keep what is in their memory.

        Raises:
            ConfigError: the tenant is neither a string nor None.
            OSError: a file could not be deleted; memory was cleared.
        """
        if not isinstance(tenant, EllipsisType):
            check_tenant(tenant)
        with self._lock:
            self._clears += 1
            for name in list(self._shelves.by_tenant) if isinstance(tenant, EllipsisType) else [tenant]:
                self._shelves.drop(name)
        if self.files is not None:
            if isinstance(tenant, EllipsisType):
                self.files.clear()
            else:
                self.files.clear(lambda key: owner_digest(key, tenant))

    def statistics(self) -> PrefixStatistics:
        """Return what happened so far; all counts are of the same moment, but for those of files."""
        files = self.files
        with self._lock:
            tenants = {}
            for name, counts in self._counters.tenants.items():
                shelf = self._shelves.of(name)
                tenants[name] = PrefixCounts(**vars(counts), stored_blocks=len(shelf.blocks), bytes=shelf.size)
            return PrefixStatistics(
                **vars(self._counters.total),
                stored_blocks=sum(len(shelf.blocks) for shelf in self._shelves.by_tenant.values()),
                bytes=self._shelves.bytes,
                crossings=self._counters.crossings,
                tenants=tenants,
                file_blocks_read=files.read_blocks if files else 0,
                file_blocks_written=files.written_blocks if files else 0,
                file_blocks_deleted=files.deleted_blocks if files else 0,
                damaged=files.damaged if files else 0,
                refused=files.refused if files else 0,
                files_stopped=files.stopped if files else None,
            )

    def _chain(self, tenant: str | None, root: bytes, tokens: Sequence[int]) -> Chain:
        return chain_of(tenant, root, tokens, self.block_tokens)

    def _load(self, files: PrefixFiles, tenant: str | None, key: bytes, packed: bytes, at: int) -> PrefixBlock | None:
        found = files.read(key)
        if found is None or found.tokens != tokens_digest(packed):
            return None
        if found.owner != owner_digest(key, tenant):
            with self._lock:
                self._counters.crossings += 1
            return None
        return PrefixBlock(tenant, at * self.block_tokens, (at + 1) * self.block_tokens, packed, found.tensors)
