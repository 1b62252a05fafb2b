"""The blocks in memory, a shelf for each tenant, and which of them have to go when there is no room.

Blocks are forgotten from the ends of chains, as in RadixAttention (Zheng et al., 2023, arXiv:2312.07104); here per
tenant.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

import torch

from hf_accel.cache.prefix.chain import Chain
from hf_accel.cache.prefix.counts import Counters

Victims = list[tuple[str | None, bytes]]  # tenant and key of blocks that have to go


@dataclass(frozen=True, slots=True, eq=False)
class PrefixBlock:
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


@dataclass
class Shelf:
    """The blocks of one tenant by key, used longest ago first, and the sum of their sizes."""

    blocks: OrderedDict[bytes, PrefixBlock] = field(default_factory=OrderedDict)
    size: int = 0


class Shelves:
    """Blocks of at most `budget_bytes` in all; whoever calls holds the store's lock.

    When there is no room, the tenant that holds the most bytes gives up what it used longest ago, in case of a tie the
    one that adds: none is pushed below its share of the budget by another. Of a chain the last block goes first.
    """

    def __init__(self, budget_bytes: int, counters: Counters) -> None:
        self.budget_bytes, self._counters = budget_bytes, counters
        self.by_tenant: dict[str | None, Shelf] = {}  # of tenants that hold at least one block
        self.bytes = 0

    def resize(self, budget_bytes: int) -> None:
        """Hold at most so many bytes from now on."""
        self.budget_bytes = budget_bytes
        self._evict(self._victims(None, 0, []) or [])

    def of(self, tenant: str | None) -> Shelf:
        """Return what a tenant holds."""
        return self.by_tenant.get(tenant) or Shelf()

    def find(self, tenant: str | None, chain: Chain) -> list[PrefixBlock]:
        """Return the blocks with which a chain begins, as many as are there."""
        shelf, found = self.of(tenant), []
        for key, packed in chain:
            block = shelf.blocks.get(key)
            if block is None or block.tokens != packed:
                break
            if block.owner != tenant:  # the key rules it out; this does not rely on the key
                self._counters.crossings += 1
                break
            found.append(block)
        return found

    def holds(self, tenant: str | None, key: bytes) -> bool:
        """Return whether a tenant holds the block of a key."""
        shelf = self.by_tenant.get(tenant)
        return shelf is not None and key in shelf.blocks

    def touch(self, tenant: str | None, chain: Chain) -> None:
        """Mark the blocks of a chain as used now, the first one last.

        A block is thereby always more recent than those that follow it in a chain, and the oldest one of a tenant
        followed by none: evicting it leaves nothing behind that cannot be reached.
        """
        shelf = self.by_tenant.get(tenant)
        if shelf is not None:
            for key, _ in reversed(chain):
                if key in shelf.blocks:  # else evicted meanwhile, together with all that follows it
                    shelf.blocks.move_to_end(key)

    def insert(self, tenant: str | None, chain: Chain, at: int, block: PrefixBlock) -> bool:
        """Store a block as the `at`-th of a chain if it can be reached, is new and finds room."""
        if self.holds(tenant, chain[at][0]) or (at and not self.holds(tenant, chain[at - 1][0])):
            return False
        victims = self._victims(tenant, block.size, chain[:at])
        if victims is None:
            return False
        self._evict(victims)
        shelf = self.by_tenant.setdefault(tenant, Shelf())
        shelf.blocks[chain[at][0]] = block
        shelf.size += block.size
        self.bytes += block.size
        self.touch(tenant, chain[:at])
        self._counters.add(tenant, added_blocks=1)
        return True

    def drop(self, tenant: str | None) -> None:
        """Forget all blocks of a tenant."""
        shelf = self.by_tenant.pop(tenant, None)
        if shelf is not None:
            self.bytes -= shelf.size
            self._counters.add(tenant, cleared_blocks=len(shelf.blocks))

    def _evict(self, victims: Victims) -> None:
        for tenant, key in victims:
            shelf = self.by_tenant[tenant]
            size = shelf.blocks.pop(key).size
            shelf.size -= size
            self.bytes -= size
            if not shelf.blocks:
                del self.by_tenant[tenant]
            self._counters.add(tenant, evicted_blocks=1)

    def _victims(self, tenant: str | None, size: int, before: Chain) -> Victims | None:
        """Return whom to evict for `size` bytes that a tenant adds behind the chain `before`; None: there is no room.

        Nothing is evicted for a block that would not find room after all.
        """
        missing = self.bytes + size - self.budget_bytes
        victims: Victims = []
        if missing <= 0 or size > self.budget_bytes:
            return None if missing > 0 else victims
        self.touch(tenant, before)
        size_of = {name: shelf.size for name, shelf in self.by_tenant.items()}
        oldest = {name: iter(shelf.blocks.items()) for name, shelf in self.by_tenant.items()}
        if tenant in oldest:
            own = self.by_tenant[tenant].blocks
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
