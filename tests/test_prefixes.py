"""Blocks of prompts: against a model of plain lists, to the byte, and what is found is what was stored."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hf_accel.cache.prefix.shelf import PrefixBlock
from hf_accel.cache.prefix.store import PrefixStore
from hf_accel.errors import ConfigError

ROOT = b"weights"
BYTES = 16  # of a block that `plain` makes


def plain(start: int, stop: int) -> list[torch.Tensor]:
    return [torch.full((BYTES,), start, dtype=torch.uint8)]


def telling(tenant: str | None, root: bytes, tokens: Sequence[int]) -> Callable[[int, int], list[torch.Tensor]]:
    """Return a `make` whose tensors say whose they are and of which tokens: all up to the end of the block."""

    def make(start: int, stop: int) -> list[torch.Tensor]:
        whose = torch.tensor(list(repr((tenant, root)).encode()), dtype=torch.uint8)
        return [whose, torch.tensor(tokens[:stop]), torch.full((stop - start, 2), start, dtype=torch.bfloat16)]

    return make


def verify(found: list[PrefixBlock], tenant: str | None, root: bytes, tokens: Sequence[int]) -> None:
    """The blocks follow each other from the first token on, and hold what was made for exactly this prefix."""
    stop = 0
    for block in found:
        assert block.start == stop
        stop = block.stop
        assert block.owner == tenant
        assert block.tokens == struct.pack(f"<{stop - block.start}q", *tokens[block.start : stop])
        for held, made in zip(block.tensors, telling(tenant, root, tokens)(block.start, stop), strict=True):
            assert torch.equal(held, made)
    assert stop <= len(tokens)


def consistent(store: PrefixStore) -> None:
    """Sums are sums, within the budget; every block can be reached, and is more recent than those behind it."""
    statistics, total = store.statistics(), 0
    for shelf in store._shelves.by_tenant.values():
        keys, reachable = list(shelf.blocks), set()
        for key, block in reversed(shelf.blocks.items()):  # a block's predecessor comes first
            followed = [other for other in reachable if hashlib.sha256(other + block.tokens).digest() == key]
            assert block.start == 0 or followed, "a block that no match can reach"
            reachable.add(key)
        assert keys
        assert shelf.size == sum(tensor.nbytes for block in shelf.blocks.values() for tensor in block.tensors)
        total += shelf.size
    assert statistics.bytes == total <= store.budget_bytes
    assert statistics.stored_blocks == sum(len(shelf.blocks) for shelf in store._shelves.by_tenant.values())
    assert statistics.stored_blocks == statistics.added_blocks - statistics.evicted_blocks - statistics.cleared_blocks
    assert statistics.crossings == 0
    for name in ("hits", "misses", "reused_tokens", "added_blocks", "evicted_blocks", "stored_blocks", "bytes"):
        assert getattr(statistics, name) == sum(getattr(counts, name) for counts in statistics.tenants.values()), name


def length(store: PrefixStore, tokens: Sequence[int], tenant: str | None = None, root: bytes = ROOT) -> int:
    return len(store.match(tenant, root, tokens))


class Twins(RuleBasedStateMachine):
    """A store, and lists of what it should hold: per tenant (root, all tokens, bytes), used longest ago first."""

    @initialize(budget=st.integers(1, 1200), block_tokens=st.integers(1, 3))
    def start(self, budget: int, block_tokens: int) -> None:
        self.store, self.budget, self.block = PrefixStore(budget, block_tokens), budget, block_tokens
        self.held: dict[str | None, list[tuple[bytes, tuple[int, ...], int]]] = {}
        self.matches = 0

    def prefixes(self, root: bytes, tokens: list[int]) -> list[tuple[bytes, tuple[int, ...]]]:
        stops = range(self.block, len(tokens) + 1, self.block)
        return [(root, tuple(tokens[:stop])) for stop in stops]

    def use(self, tenant: str | None, chain: list[tuple[bytes, tuple[int, ...]]]) -> int:
        """Move the longest held part of the chain to the end, its first block last; return how long it is."""
        held = self.held.get(tenant, [])
        known = {entry[:2]: entry for entry in held}
        count = next((at for at, prefix in enumerate(chain) if prefix not in known), len(chain))
        for prefix in reversed(chain[:count]):
            held.remove(known[prefix])
            held.append(known[prefix])
        return count

    def make_room(self, tenant: str | None, size: int, kept: set[Any]) -> bool:
        trial = {name: list(entries) for name, entries in self.held.items()}
        while sum(entry[2] for entries in trial.values() for entry in entries) + size > self.budget:
            sums = {name: sum(entry[2] for entry in entries) for name, entries in trial.items()}
            most = max(sums.values(), default=0)
            names = [name for name in sums if sums[name] == most]
            if not names:
                return False
            victim = tenant if tenant in names else names[0]
            if not trial[victim] or (victim == tenant and trial[victim][0][:2] in kept):
                return False
            del trial[victim][0]
        self.held = {name: entries for name, entries in trial.items() if entries}
        return True

    @rule(
        tenant=st.sampled_from([None, "", "a"]),
        root=st.sampled_from([b"", b"r"]),
        tokens=st.lists(st.integers(0, 1), max_size=9),
    )
    def add(self, tenant: str | None, root: bytes, tokens: list[int]) -> None:
        calls: list[int] = []

        def make(start: int, stop: int) -> list[torch.Tensor]:
            calls.append(start)
            assert self.store.statistics().bytes <= self.budget
            return telling(tenant, root, tokens)(start, stop)

        found = self.store.add(tenant, root, tokens, make)
        chain = self.prefixes(root, tokens)
        first = self.use(tenant, chain)
        expected = 0
        for at, prefix in enumerate(chain[first:], first):
            made = telling(tenant, root, tokens)(len(prefix[1]) - self.block, len(prefix[1]))
            size = sum(tensor.nbytes for tensor in made)
            if not self.make_room(tenant, size, set(chain[:at])):
                break
            self.held.setdefault(tenant, []).append((*prefix, size))
            self.use(tenant, chain[:at])
            expected += 1
        assert found == expected
        assert calls == [at * self.block for at in range(first, min(first + expected + 1, len(chain)))]

    @rule(
        tenant=st.sampled_from([None, "", "a", "b"]),
        root=st.sampled_from([b"", b"r"]),
        tokens=st.lists(st.integers(0, 1), max_size=9),
    )
    def match(self, tenant: str | None, root: bytes, tokens: list[int]) -> None:
        self.matches += 1
        found = self.store.match(tenant, root, tokens)
        verify(found, tenant, root, tokens)
        assert len(found) == self.use(tenant, self.prefixes(root, tokens))

    @rule(tenant=st.sampled_from([None, "a", ...]))
    def clear(self, tenant: Any) -> None:
        if tenant is ...:
            self.store.clear()
            self.held.clear()
        else:
            self.store.clear(tenant)
            self.held.pop(tenant, None)

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "store"):
            return
        consistent(self.store)
        shelves = self.store._shelves.by_tenant
        assert set(shelves) == set(self.held)
        for tenant, entries in self.held.items():
            assert [block.tensors[1].tolist() for block in shelves[tenant].blocks.values()] == [
                list(tokens) for _, tokens, _ in entries
            ]
        statistics = self.store.statistics()
        assert statistics.hits + statistics.misses == self.matches


TestModel = Twins.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40)


def test_the_longest_chain_of_whole_blocks_is_found() -> None:
    store = PrefixStore(10**6, block_tokens=4)
    tokens = list(range(14))
    assert store.add("a", ROOT, tokens, telling("a", ROOT, tokens)) == 3
    assert store.add("a", ROOT, tokens, plain) == 0, "they are there"
    for given, expected in (
        (tokens, 3),
        ([*tokens, 99, 98], 3),  # the rest of a block is not stored
        (tokens[:12], 3),
        (tokens[:11], 2),
        (tokens[:3], 0),
        ([], 0),
        ([*tokens[:7], 99, *tokens[8:]], 1),
        ([99, *tokens[1:]], 0),
        (tokens[4:], 0),  # the same tokens at another place
        (tuple(tokens), 3),
    ):
        found = store.match("a", ROOT, given)
        assert len(found) == expected, given
        verify(found, "a", ROOT, given)
    statistics = store.statistics()
    assert (statistics.hits, statistics.misses, statistics.reused_tokens) == (6, 4, 0)
    store.count_reused("a", 12)
    assert store.statistics().reused_tokens == store.statistics().tenants["a"].reused_tokens == 12
    branch = [*tokens[:8], 50, 51, 52, 53]
    assert store.add("a", ROOT, branch, telling("a", ROOT, branch)) == 1, "what two prompts share is stored once"
    verify(store.match("a", ROOT, branch), "a", ROOT, branch)
    assert length(store, branch, "a") == length(store, tokens, "a") == 3


def test_keys_are_as_documented() -> None:
    """Files of an earlier version are found under these names only."""
    for tenant, code in ((None, b"\0"), ("", b"\1"), ("é", b"\1\xc3\xa9")):
        parts = (b"hf_accel prefix", code, ROOT, (2).to_bytes(8, "little"))
        key = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
        chain = PrefixStore(1, block_tokens=2)._chain(tenant, ROOT, [1, -1, 2**40, 0, 5])
        packed = [b"\1" + bytes(7) + b"\xff" * 8, bytes(5) + b"\1" + bytes(10)]
        for (found, tokens), expected in zip(chain, packed, strict=True):
            key = hashlib.sha256(key + expected).digest()
            assert (found, tokens) == (key, expected)


def test_keys_that_collide_give_no_wrong_text() -> None:
    store, tokens = PrefixStore(10**6, block_tokens=2), [1, 2, 3, 4, 5, 6]
    store.add(None, ROOT, tokens, plain)
    shelf = store._shelves.by_tenant[None]
    key = list(shelf.blocks)[1]
    shelf.blocks[key] = dataclasses.replace(shelf.blocks[key], tokens=struct.pack("<2q", 3, 9))
    assert length(store, tokens) == 1


def test_the_ends_of_chains_go_first() -> None:
    store = PrefixStore(6 * BYTES, block_tokens=1)
    store.add(None, ROOT, [1, 2, 3], plain)
    store.add(None, ROOT, [7, 8, 9], plain)
    lengths = []
    for new in range(20, 25):
        store.match(None, ROOT, [7, 8])  # 9 is as old as 1 2 3, but younger
        store.add(None, ROOT, [new], plain)
        held = [struct.unpack("<q", block.tokens)[0] for block in store._shelves.by_tenant[None].blocks.values()]
        lengths.append([sum(token in held for token in chain) for chain in ([1, 2, 3], [7, 8, 9])])
        consistent(store)
    assert lengths == [[2, 3], [1, 3], [0, 3], [0, 2], [0, 2]]
    assert store.statistics().evicted_blocks == 5


def test_a_chain_longer_than_the_budget_keeps_its_beginning() -> None:
    store = PrefixStore(3 * BYTES + 1, block_tokens=1)
    store.add(None, ROOT, [50, 51], plain)
    assert store.add(None, ROOT, list(range(10)), plain) == 3
    assert length(store, list(range(10))) == 3
    assert length(store, [50]) == 0
    assert store.statistics().bytes == 3 * BYTES
    consistent(store)


def test_a_block_larger_than_the_budget_evicts_nothing() -> None:
    store = PrefixStore(2 * BYTES, block_tokens=1)
    store.add(None, ROOT, [1, 2], plain)
    for tensors in ([torch.zeros(2 * BYTES + 1, dtype=torch.uint8)], [], [torch.zeros(0)]):
        assert store.add(None, ROOT, [3, 4], lambda start, stop, made=tensors: made) == 0
    assert store.add("b", ROOT, [3], lambda start, stop: [torch.zeros(2 * BYTES, dtype=torch.uint8)]) == 1
    assert length(store, [1, 2]) == 0
    consistent(store)


@pytest.mark.parametrize("narrow", [False, True])
def test_tensors_are_compact_and_the_stores_own(narrow: bool) -> None:
    buffer = torch.arange(2 * 8 * 3, dtype=torch.float32).reshape(1, 2, 8, 3)
    before = buffer.clone()
    size = 4 if narrow else 8
    store = PrefixStore(10**6, block_tokens=size)
    store.add(None, ROOT, list(range(size)), lambda start, stop: [buffer[:, :, start:stop], buffer.transpose(1, 2)])
    buffer.fill_(-1)
    (block,) = store.match(None, ROOT, list(range(size)))
    assert torch.equal(block.tensors[0], before[:, :, :size])
    assert torch.equal(block.tensors[1], before.transpose(1, 2))
    assert all(tensor.is_contiguous() for tensor in block.tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in block.tensors)
    assert store.statistics().bytes == block.size == 4 * 2 * 3 * (size + 8)


def test_what_was_given_out_stays_valid() -> None:
    store, tokens = PrefixStore(300, block_tokens=2), [1, 2, 3, 4]
    store.add(None, ROOT, tokens, telling(None, ROOT, tokens))
    found = store.match(None, ROOT, tokens)
    assert found
    store.clear()
    store.add(None, ROOT, [9] * 8, telling(None, ROOT, [9] * 8))
    verify(found, None, ROOT, tokens)
    assert length(store, tokens) == 0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None, "64"])
def test_sizes_that_make_no_sense_are_refused(wrong: Any) -> None:
    for name in ("budget_bytes", "block_tokens"):
        with pytest.raises(ConfigError, match=f"{name} is a whole number, at least 1; {wrong!r} was given"):
            PrefixStore(**{"budget_bytes": 1, name: wrong})


def test_what_is_no_tenant_or_root_is_refused() -> None:
    store = PrefixStore(1)
    calls: list[Callable[[], Any]] = [
        lambda: store.match(b"a", ROOT, [1]),  # type: ignore[arg-type]
        lambda: store.add(5, ROOT, [1], plain),  # type: ignore[arg-type]
        lambda: store.clear(b"a"),  # type: ignore[arg-type]
        lambda: store.match("a", "weights", [1]),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="was given"):
            call()
