"""Key/value blocks of prompts kept between calls, so that a prompt that begins the same is not computed again.

Blocks are found by a hash chain, as in the automatic prefix caching of vLLM (Kwon et al., 2023, arXiv:2309.06180), and
forgotten from the ends of chains, as in RadixAttention (Zheng et al., 2023, arXiv:2312.07104); here per tenant.
Cost: a few microseconds per block of the prompt, and the memory of the blocks, which has a bound.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import EllipsisType

import torch

from hf_accel.cache.prefix.counts import Counting, PrefixCounts, PrefixStatistics
from hf_accel.cache.prefix.files import PrefixFiles
from hf_accel.errors import ConfigError

MAXIMUM_TENANTS_COUNTED = 1024

Victims = list[tuple[str | None, bytes]]  # tenant and key of blocks that have to go
Chain = list[tuple[bytes, bytes]]  # key and tokens of each whole block of a prompt, the first block first


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What was stored for positions [start, stop) of a prompt. It stays valid when the store has dropped it."""

    owner: str | None
    start: int
    stop: int
    tokens: bytes  # int64, little-endian
    tensors: tuple[torch.Tensor, ...]  # to be read only: others are given the same ones

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class PrefixStore:
    """Blocks of at most `budget_bytes`, found by tenant, by `root` and by the tokens from the first on.

    `root` stands for all else that keys and values depend on: weights, dtype, layout of the cache. None is a tenant
    like any other. Each tenant has a table of its own, so that what one stored is neither seen by another nor changes
    how long a look takes. Any thread may call any method at any time.

    When there is no room, the tenant that holds the most bytes gives up what it used longest ago, in case of a tie the
    one that adds: none is pushed below its share of the budget by another. Of a chain the last block goes first.
    """

    def __init__(self, budget_bytes: int, block_tokens: int = 64, files: PrefixFiles | None = None) -> None:
        """Keep at most `budget_bytes` bytes of tensors, in blocks of `block_tokens` tokens; and a copy in `files`.

        Raises:
            ConfigError: one of the numbers is no whole number of at least 1.
        """
        for name, value in (("budget_bytes", budget_bytes), ("block_tokens", block_tokens)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is a whole number, at least 1; {value!r} was given.")
        self.budget_bytes, self.block_tokens, self.files = budget_bytes, block_tokens, files
        self._shelves: dict[str | None, _Shelf] = {}  # of tenants that hold at least one block
        self._bytes = self._crossings = self._clears = 0
        self._total = Counting()
        self._counts: OrderedDict[str | None, Counting] = OrderedDict()
        self._lock = threading.Lock()

    def resize(self, budget_bytes: int) -> None:
        """Keep at most `budget_bytes` from now on: calls with budgets of their own share what they store."""
        with self._lock:
            self.budget_bytes = budget_bytes
            self._evict(self._victims(None, 0, []) or [])

    def match(self, tenant: str | None, root: bytes, tokens: Sequence[int]) -> list[Block]:
        """Return the longest stored chain of whole blocks that `tokens` begin with, and mark it as used.

        Raises:
            ConfigError: the tenant is neither a string nor None, or the root is not bytes.
        """
        chain = self._chain(tenant, root, tokens)
        with self._lock:
            began, found = self._clears, self._held(tenant, chain)
        while self.files is not None and len(found) < len(chain):
            block = self._load(self.files, tenant, *chain[len(found)], len(found))
            if block is None:
                break
            with self._lock:
                if self._clears == began:
                    self._insert(tenant, chain, len(found), block)
            found.append(block)
        with self._lock:
            self._touch(tenant, chain[: len(found)])
            for counts in (self._total, self._counts_of(tenant)):
                counts.hits += bool(found)
                counts.misses += not found
        if self.files is not None:
            self.files.touch([key for key, _ in chain[: len(found)]])
        return found

    def count_reused(self, tenant: str | None, tokens: int) -> None:
        """Note how many tokens of what `match` returned were made use of: rows of a batch take equally many columns."""
        with self._lock:
            for counts in (self._total, self._counts_of(tenant)):
                counts.reused_tokens += tokens

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
            began, held = self._clears, len(self._held(tenant, chain))
            self._touch(tenant, chain[:held])
        for at, (key, packed) in enumerate(chain[held:], held):
            with self._lock:
                if self._holds(tenant, key):  # added by another thread meanwhile
                    continue
            start, stop = at * self.block_tokens, (at + 1) * self.block_tokens
            made = make(start, stop)
            if not 0 < sum(tensor.nbytes for tensor in made) <= self.budget_bytes:
                break
            # views would keep their whole buffers in memory, and be overwritten with them
            own = tuple(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in made)
            block = Block(tenant, start, stop, packed, own)
            with self._lock:
                is_new = self._clears == began and self._insert(tenant, chain, at, block)
                if not self._holds(tenant, key):
                    break
            stored += is_new
            if is_new and self.files is not None:
                self.files.write(key, _owner(key, tenant), _digest(packed), block.tensors, at)
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
            _check(tenant)
        with self._lock:
            self._clears += 1
            for name in list(self._shelves) if isinstance(tenant, EllipsisType) else [tenant]:
                shelf = self._shelves.pop(name, None)
                if shelf is not None:
                    self._bytes -= shelf.size
                    for counts in (self._total, self._counts_of(name)):
                        counts.cleared_blocks += len(shelf.blocks)
        if self.files is not None:
            if isinstance(tenant, EllipsisType):
                self.files.clear()
            else:
                self.files.clear(lambda key: _owner(key, tenant))

    def statistics(self) -> PrefixStatistics:
        """Return what happened so far; all counts are of the same moment, but for those of files."""
        files = self.files
        with self._lock:
            tenants = {}
            for name, counts in self._counts.items():
                shelf = self._shelves.get(name) or _Shelf()
                tenants[name] = PrefixCounts(**vars(counts), stored_blocks=len(shelf.blocks), bytes=shelf.size)
            return PrefixStatistics(
                **vars(self._total),
                stored_blocks=sum(len(shelf.blocks) for shelf in self._shelves.values()),
                bytes=self._bytes,
                crossings=self._crossings,
                tenants=tenants,
                file_blocks_read=files.read_blocks if files else 0,
                file_blocks_written=files.written_blocks if files else 0,
                file_blocks_deleted=files.deleted_blocks if files else 0,
                damaged=files.damaged if files else 0,
                refused=files.refused if files else 0,
                files_stopped=files.stopped if files else None,
            )

    def _chain(self, tenant: str | None, root: bytes, tokens: Sequence[int]) -> Chain:
        _check(tenant)
        if not isinstance(root, bytes):
            raise ConfigError(f"The root of a prefix is bytes; {root!r} was given.")
        size, chain = self.block_tokens, []
        key = _digest_of(b"hf_accel prefix", _tenant_bytes(tenant), root, struct.pack("<q", size))
        for start in range(0, len(tokens) - size + 1, size):
            packed = struct.pack(f"<{size}q", *tokens[start : start + size])
            key = hashlib.sha256(key + packed).digest()
            chain.append((key, packed))
        return chain

    def _load(self, files: PrefixFiles, tenant: str | None, key: bytes, packed: bytes, at: int) -> Block | None:
        record = files.read(key)
        if record is None or record.tokens != _digest(packed):
            return None
        if record.owner != _owner(key, tenant):
            with self._lock:
                self._crossings += 1
            return None
        return Block(tenant, at * self.block_tokens, (at + 1) * self.block_tokens, packed, record.tensors)

    # the caller of what follows holds the lock

    def _held(self, tenant: str | None, chain: Chain) -> list[Block]:
        shelf, found = self._shelves.get(tenant) or _Shelf(), []
        for key, packed in chain:
            block = shelf.blocks.get(key)
            if block is None or block.tokens != packed:
                break
            if block.owner != tenant:  # the key rules it out; this does not rely on the key
                self._crossings += 1
                break
            found.append(block)
        return found

    def _holds(self, tenant: str | None, key: bytes) -> bool:
        shelf = self._shelves.get(tenant)
        return shelf is not None and key in shelf.blocks

    def _touch(self, tenant: str | None, chain: Chain) -> None:
        """Mark the blocks of a chain as used now, the first one last.

        A block is thereby always more recent than those that follow it in a chain, and the oldest one of a tenant
        followed by none: evicting it leaves nothing behind that cannot be reached.
        """
        shelf = self._shelves.get(tenant)
        if shelf is not None:
            for key, _ in reversed(chain):
                if key in shelf.blocks:  # else evicted meanwhile, together with all that follows it
                    shelf.blocks.move_to_end(key)

    def _insert(self, tenant: str | None, chain: Chain, at: int, block: Block) -> bool:
        """Store a block as the `at`-th of a chain if it can be reached, is new and finds room."""
        if self._holds(tenant, chain[at][0]) or (at and not self._holds(tenant, chain[at - 1][0])):
            return False
        victims = self._victims(tenant, block.size, chain[:at])
        if victims is None:
            return False
        self._evict(victims)
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.blocks[chain[at][0]] = block
        shelf.size += block.size
        self._bytes += block.size
        self._touch(tenant, chain[:at])
        for counts in (self._total, self._counts_of(tenant)):
            counts.added_blocks += 1
        return True

    def _evict(self, victims: Victims) -> None:
        for name, key in victims:
            shelf = self._shelves[name]
            size = shelf.blocks.pop(key).size
            shelf.size -= size
            self._bytes -= size
            if not shelf.blocks:
                del self._shelves[name]
            for counts in (self._total, self._counts_of(name)):
                counts.evicted_blocks += 1

    def _victims(self, tenant: str | None, size: int, before: Chain) -> Victims | None:
        """Return whom to evict for `size` bytes that a tenant adds behind the chain `before`; None: there is no room.

        Nothing is evicted for a block that would not find room after all.
        """
        missing = self._bytes + size - self.budget_bytes
        victims: Victims = []
        if missing <= 0 or size > self.budget_bytes:
            return None if missing > 0 else victims
        self._touch(tenant, before)
        size_of = {name: shelf.size for name, shelf in self._shelves.items()}
        oldest = {name: iter(shelf.blocks.items()) for name, shelf in self._shelves.items()}
        if tenant in oldest:
            own = self._shelves[tenant].blocks
            oldest[tenant] = islice(own.items(), len(own) - len(before))
        while missing > 0:
            most = max(size_of.values())
            largest = tenant if size_of.get(tenant) == most else max(size_of, key=size_of.__getitem__)
            victim = next(oldest[largest], None)
            if victim is None:  # only what the new block follows is left
                return None
            key, block = victim
            victims.append((largest, key))
            size_of[largest] -= block.size
            missing -= block.size
        return victims

    def _counts_of(self, tenant: str | None) -> Counting:
        counts = self._counts.setdefault(tenant, Counting())
        self._counts.move_to_end(tenant)
        if len(self._counts) > MAXIMUM_TENANTS_COUNTED:
            self._counts.popitem(last=False)
        return counts


@dataclass
class _Shelf:
    """The blocks of one tenant by key, used longest ago first, and the sum of their sizes."""

    blocks: OrderedDict[bytes, Block] = field(default_factory=OrderedDict)
    size: int = 0


def _check(tenant: str | None) -> None:
    if tenant is not None and not isinstance(tenant, str):
        raise ConfigError(f"A tenant is a string or None; {tenant!r} was given.")


def _tenant_bytes(tenant: str | None) -> bytes:
    return b"\0" if tenant is None else b"\1" + tenant.encode("utf-8", "surrogatepass")


def _digest_of(*parts: bytes) -> bytes:
    """Return the SHA-256 of byte strings; their lengths are hashed with them, so that no other ones have the same."""
    return hashlib.sha256(b"".join(struct.pack("<q", len(part)) + part for part in parts)).digest()


def _owner(key: bytes, tenant: str | None) -> str:
    """Return what tells, in a file, whose it is: to those who know the tenant, and differently in every file."""
    return _digest_of(b"hf_accel owner", key, _tenant_bytes(tenant)).hex()


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()
