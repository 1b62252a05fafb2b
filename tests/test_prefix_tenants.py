"""Blocks of prompts of several tenants: nobody's are another's, or pushed out by another, whatever threads do."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from test_prefixes import BYTES, ROOT, consistent, length, plain, telling, verify

from hf_accel.cache.prefix import chain
from hf_accel.cache.prefix.counts import MAXIMUM_TENANTS_COUNTED
from hf_accel.cache.prefix.shelf import PrefixBlock
from hf_accel.cache.prefix.store import PrefixStore

ALIKE = [None, "", "None", "a", "a\0", "\0a", "\0", "A", "a ", "b'a'", "0", "é", "e\u0301", "\ud800"]


def size_of(store: PrefixStore, tenant: str | None) -> int:
    return store.statistics().tenants[tenant].bytes


def test_no_two_tenants_roots_or_sizes_share_a_key() -> None:
    keys = set()
    askers = [(tenant, root) for tenant in ALIKE for root in (b"", b"a", b"\0", b"\0a", ROOT)]
    for tenant, root in askers:
        for size in (1, 2):
            keys.add(PrefixStore(1, block_tokens=size)._chain(tenant, root, [7, 7])[0][0])
    assert len(keys) == 2 * len(askers)
    for one, other in ((("a", b"bc"), ("ab", b"c")), (("", b"\1"), ("\1", b""))):
        assert PrefixStore(1, 1)._chain(*one, [1]) != PrefixStore(1, 1)._chain(*other, [1])


@pytest.mark.parametrize("is_keyed", [True, False])
def test_tenants_and_roots_find_nothing_of_each_other(is_keyed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if keys did not depend on the tenant."""
    if not is_keyed:
        monkeypatch.setattr(chain, "_tenant_bytes", lambda tenant: b"")
    store, tokens = PrefixStore(10**6, block_tokens=2), [1, 2, 3, 4]
    for at, tenant in enumerate(ALIKE):
        for other in ALIKE[at:]:
            assert store.match(other, ROOT, tokens) == []
        assert store.add(tenant, ROOT, tokens, telling(tenant, ROOT, tokens)) == 2
        assert store.match(tenant, b"other weights", tokens) == []
    for tenant in ALIKE:
        verify(store.match(tenant, ROOT, tokens), tenant, ROOT, tokens)
        assert length(store, tokens, tenant) == 2
    store.clear("a")
    assert [length(store, tokens, tenant) for tenant in ALIKE] == [2 * (tenant != "a") for tenant in ALIKE]
    assert store.statistics().crossings == 0


def test_another_tenants_block_is_refused_and_counted() -> None:
    """A table that two tenants share by mistake, with keys that would agree: nothing is served."""
    store, tokens = PrefixStore(10**6, block_tokens=2), [1, 2, 3, 4]
    store.add("a", ROOT, tokens, plain)
    store._shelves.by_tenant["b"] = store._shelves.by_tenant["a"]
    store._chain = lambda tenant, root, given: PrefixStore._chain(store, "a", root, given)  # type: ignore[method-assign]
    assert store.match("b", ROOT, tokens) == []
    assert store.statistics().crossings == 1
    assert length(store, tokens, "a") == 2
    assert store.statistics().crossings == 1


def test_a_look_touches_nothing_of_other_tenants() -> None:
    store, tokens = PrefixStore(10**6, block_tokens=2), [1, 2, 3, 4]
    store.add("a", ROOT, tokens, plain)
    store.add("b", ROOT, tokens[:2], plain)
    store._shelves.by_tenant["a"] = object()  # type: ignore[assignment]
    assert length(store, tokens, "b") == 1
    assert length(store, tokens, "c") == 0


def test_a_flooding_tenant_evicts_its_own() -> None:
    store = PrefixStore(12 * BYTES, block_tokens=1)
    for tenant in ("quiet", None):
        store.add(tenant, ROOT, [1, 2, 3, 4], plain)
    for token in range(200):
        store.add("flood", ROOT, [token, token], plain)
        assert size_of(store, "quiet") == size_of(store, None) == 4 * BYTES
        consistent(store)
    assert [length(store, [1, 2, 3, 4], tenant) for tenant in ("quiet", None)] == [4, 4]
    assert size_of(store, "flood") == 4 * BYTES


def test_who_holds_more_than_a_share_gives_way() -> None:
    store = PrefixStore(12 * BYTES, block_tokens=1)
    store.add("old", ROOT, list(range(12)), plain)
    for token in range(50):
        store.add("new", ROOT, [token], plain)
    assert (size_of(store, "old"), size_of(store, "new")) == (6 * BYTES, 6 * BYTES)
    assert length(store, list(range(12)), "old") == 6
    statistics = store.statistics()
    assert (statistics.tenants["old"].evicted_blocks, statistics.tenants["new"].evicted_blocks) == (6, 44)


def test_tenants_that_come_and_go_leave_no_counters() -> None:
    store = PrefixStore(BYTES, block_tokens=1)
    for number in range(MAXIMUM_TENANTS_COUNTED + 50):
        store.match(str(number), ROOT, [1])
        store.add(str(number), ROOT, [1], plain)
    assert len(store.statistics().tenants) == MAXIMUM_TENANTS_COUNTED
    assert len(store._shelves.by_tenant) == 1


@pytest.fixture
def _busy() -> Iterator[None]:
    """Let threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], None], threads: int = 8) -> None:
    """Run work(0), work(1) ... at once, and raise what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
        assert not thread.is_alive(), "threads wait for each other"
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("_busy")
@pytest.mark.parametrize("budget", [400, 3000, 10**6])
def test_threads_of_several_tenants(budget: int) -> None:
    """Each block says whose it is and of which tokens; those given out are looked at again when all is over."""
    store = PrefixStore(budget, block_tokens=2)
    tenants, roots = [None, "", "a", "a\0"], [b"", b"r"]
    given: list[tuple[list[PrefixBlock], str | None, bytes, list[int]]] = []
    matches: list[int] = []
    added: list[int] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        for _ in range(150):
            tenant, root = dice.choice(tenants), dice.choice(roots)
            tokens = [dice.randrange(2) for _ in range(dice.randrange(12))]
            make = telling(tenant, root, tokens)

            def nested(start: int, stop: int, make: Callable = make) -> list[torch.Tensor]:
                what = dice.random()
                if what < 0.1:
                    added.append(store.add(tenant, root, tokens, make))  # noqa: B023
                elif what < 0.2:
                    matches.append(1)
                    verify(store.match(tenant, root, tokens), tenant, root, tokens)  # noqa: B023
                elif what < 0.22:
                    store.clear(tenant)  # noqa: B023
                return make(start, stop)

            if dice.random() < 0.5:
                added.append(store.add(tenant, root, tokens, nested))
            elif dice.random() < 0.97:
                matches.append(1)
                found = store.match(tenant, root, tokens)
                verify(found, tenant, root, tokens)
                given.append((found, tenant, root, tokens))
            elif dice.random() < 0.8:
                store.clear(tenant)
            else:
                store.clear()
            statistics = store.statistics()
            assert statistics.bytes <= budget
            assert statistics.crossings == 0

    together(work)
    consistent(store)
    for found, tenant, root, tokens in given:
        verify(found, tenant, root, tokens)
    statistics = store.statistics()
    assert statistics.hits + statistics.misses == sum(matches)
    assert statistics.hits > 50
    assert statistics.added_blocks == sum(added)
    assert (statistics.evicted_blocks > 0) == (budget < 10**6)
    store.clear()
    assert (store.statistics().bytes, store.statistics().stored_blocks) == (0, 0)


@pytest.mark.usefixtures("_busy")
def test_threads_that_add_the_same_leave_one_copy() -> None:
    store, tokens, stored = PrefixStore(10**6, block_tokens=2), list(range(40)), [0] * 8
    both = threading.Barrier(8)

    def work(number: int) -> None:
        def make(start: int, stop: int) -> list[torch.Tensor]:
            if start == 0:
                both.wait(60)  # all of them found the first block missing
            return plain(start, stop)

        stored[number] = store.add("a", ROOT, tokens, make)

    together(work)
    assert sum(stored) == store.statistics().added_blocks == 20
    assert store.statistics().bytes == 20 * BYTES
    consistent(store)


def test_make_may_call_the_store() -> None:
    store, tokens, found = PrefixStore(10**6, block_tokens=1), [1, 2, 3, 4], []

    def make(start: int, stop: int) -> list[torch.Tensor]:
        assert store._lock.acquire(timeout=10), "the store waits for what it calls"
        store._lock.release()
        found.append(length(store, tokens))
        store.statistics()
        if start == 1:
            assert store.add(None, ROOT, tokens[:3], plain) == 2
        return plain(start, stop)

    assert store.add(None, ROOT, tokens, make) == 2
    assert found == [0, 1, 3]
    assert length(store, tokens) == 4
    assert store.statistics().added_blocks == 4
    consistent(store)


@pytest.mark.parametrize("tenant", [None, ...])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_nothing_is_stored_by_calls_that_were_under_way_when_all_was_cleared(tenant: str | None, at: int) -> None:
    store, calls = PrefixStore(10**6, block_tokens=1), []

    def make(start: int, stop: int) -> list[torch.Tensor]:
        calls.append(start)
        if start == at:
            store.clear(tenant)
        return plain(start, stop)

    assert store.add(None, ROOT, [1, 2, 3, 4], make) == at
    assert calls == list(range(at + 1))
    assert store.statistics().stored_blocks == 0
    consistent(store)


def test_what_lost_its_beginning_meanwhile_is_not_stored() -> None:
    store, calls = PrefixStore(4 * BYTES, block_tokens=1), []

    def make(start: int, stop: int) -> list[torch.Tensor]:
        calls.append(start)
        if start == 2:
            store.add(None, ROOT, [7, 8], plain)
        return plain(start, stop)

    assert store.add(None, ROOT, [1, 2, 3, 4], make) == 2 + 2
    assert calls == [0, 1, 2, 3]
    consistent(store)
    calls.clear()
    store.clear()

    def evict(start: int, stop: int) -> list[torch.Tensor]:
        calls.append(start)
        if start == 2:
            store.add(None, ROOT, [7, 8, 9], plain)
        return plain(start, stop)

    assert store.add(None, ROOT, [1, 2, 3, 4], evict) == 2
    assert calls == [0, 1, 2]
    assert length(store, [1, 2, 3, 4]) == 1
    assert length(store, [7, 8, 9]) == 3
    consistent(store)


def test_an_error_of_make_leaves_what_was_stored_before() -> None:
    store = PrefixStore(10**6, block_tokens=1)

    def make(start: int, stop: int) -> list[torch.Tensor]:
        if start == 2:
            raise KeyError("no such layer")
        return plain(start, stop)

    with pytest.raises(KeyError, match="no such layer"):
        store.add(None, ROOT, [1, 2, 3, 4], make)
    assert length(store, [1, 2, 3, 4]) == 2
    assert store.add(None, ROOT, [1, 2, 3, 4], plain) == 2
    consistent(store)
