"""Slots: the hot ones stay, none that is in use leaves, the budget is kept, and who waits gets its turn."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from hf_accel.errors import StorageError
from hf_accel.experts.offload import slots as module
from hf_accel.experts.offload.file import ExpertsFile, Extent
from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.statistics import concentration, said


class Owner:
    """Experts whose bytes are their number, in the place of a module's."""

    def __init__(self, first: int, sizes: list[int], start: int) -> None:
        self.first, self.bytes_of = first, sizes
        offsets = np.cumsum([start, *sizes]).tolist()
        self.extents = [(Extent(offset, size),) for offset, size in zip(offsets, sizes, strict=False)]
        self.addresses: dict[int, int | None] = {}
        self.end = offsets[-1]

    def put(self, expert: int, address: int | None) -> None:
        self.addresses[expert] = address


def slots_of(sizes: list[list[int]], budget: int) -> tuple[Slots, list[Any]]:
    owners: list[Any] = []
    start = first = 0
    for some in sizes:
        owners.append(Owner(first, some, start))
        start, first = owners[-1].end, first + len(some)
    file = ExpertsFile(None, start)
    for owner in owners:
        for expert, (extent,) in enumerate(owner.extents):
            file.write(torch.full((extent.size,), owner.first + expert, dtype=torch.uint8), extent.offset)
    return Slots(file, owners, budget), owners


def use(slots: Slots, owner: Any, experts: list[int], rows: int = 1) -> None:
    """Have a call use experts, whose bytes are looked at while they are kept."""
    chosen = np.array(experts)
    kept = slots.acquire(owner, chosen, np.full(len(experts), rows))
    for number in kept.tolist():
        assert (slots._buffers[number] == number).all()
        assert owner.addresses[number - owner.first] == slots._buffers[number].ctypes.data
    slots.release(kept)


def there(slots: Slots) -> list[int]:
    return sorted(slots._buffers)


def test_the_coldest_leaves() -> None:
    slots, (one,) = slots_of([[100] * 4], 200)
    use(slots, one, [0], rows=5)
    use(slots, one, [1])
    use(slots, one, [2])
    assert there(slots) == [0, 2]
    assert one.addresses[1] is None, "an expert in no slot is taken from the mapped file"
    use(slots, one, [3], rows=2)
    assert there(slots) == [0, 3]
    assert (slots.hits, slots.misses, slots.read_bytes) == (0, 4, 400)
    use(slots, one, [0, 3])
    assert (slots.hits, slots.misses) == (2, 4)


def test_slots_are_those_of_all_layers() -> None:
    slots, (one, two) = slots_of([[100] * 2, [100] * 4], 300)
    for _ in range(3):
        use(slots, one, [0])
        use(slots, two, [1, 2])
    use(slots, one, [1])
    assert 3 in there(slots)
    assert len(there(slots)) == 3
    for _ in range(3):
        use(slots, two, [0, 1, 2], rows=9)
    assert there(slots) == [2, 3, 4]


def test_heat_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALF_LIFE", 4)
    monkeypatch.setattr(module, "_LARGEST_GAIN", 3.0)  # so that heat is scaled again and again
    slots, (one,) = slots_of([[100] * 3], 200)
    use(slots, one, [0], rows=60)
    for _ in range(40):  # ten times half
        use(slots, one, [1])
    use(slots, one, [2])
    assert there(slots) == [1, 2]


def test_what_is_in_use_does_not_leave() -> None:
    slots, (one,) = slots_of([[100] * 4], 200)
    kept = slots.acquire(one, np.array([0]), np.array([1]))
    for _ in range(5):
        use(slots, one, [1], rows=9)
        use(slots, one, [2], rows=9)
    assert 0 in there(slots)
    slots.release(kept)


def test_bytes_are_those_of_the_budget_whatever_the_sizes() -> None:
    sizes = [[100, 300, 200, 100], [250, 50, 300, 100]]
    slots, owners = slots_of(sizes, 500)
    rng = np.random.default_rng(0)
    for _ in range(300):
        owner = owners[rng.integers(2)]
        use(slots, owner, [int(rng.integers(4))])
        held = sum(map(len, slots._buffers.values()))
        free = sum(len(each) for some in slots._free.values() for each in some)
        assert held + free == slots.held_bytes <= 500
        assert all(len(buffer) == slots.sizes[number] for number, buffer in slots._buffers.items())
    assert slots.hits > 0


def test_threads_take_turns_where_there_is_no_room_for_both() -> None:
    slots, owners = slots_of([[100] * 4, [100] * 4], 200)
    errors: list[BaseException] = []

    def work(owner: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(200):
                use(slots, owner, sorted(rng.choice(4, 2, replace=False).tolist()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(owners[i % 2], i), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "they wait for each other"
    assert not errors
    assert slots.held_bytes <= 200


@pytest.mark.parametrize("missing", [[1], [1, 2, 3]])
def test_a_failed_read_keeps_nothing(missing: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PER_THREAD", 1)
    slots, (one,) = slots_of([[100] * 4], 400)
    use(slots, one, [0])
    right = slots.file.read
    calls = [0]

    def fails(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == len(missing):
            raise StorageError("planted")
        right(*args)

    monkeypatch.setattr(slots.file, "read", fails)
    before, threads = torch.get_num_threads(), len(missing)
    torch.set_num_threads(threads)
    try:
        with pytest.raises(StorageError, match="planted"):
            use(slots, one, missing)
    finally:
        torch.set_num_threads(before)
    assert there(slots) == [0]
    assert not slots._pins.any()
    monkeypatch.setattr(slots.file, "read", right)
    use(slots, one, [0, *missing])
    assert there(slots) == [0, *missing]


def test_concentration_is_the_least_share_that_carries_most_of_the_routing() -> None:
    sizes = np.array([1, 1, 1, 1, 6])
    assert concentration(torch.tensor([0, 0, 0, 0, 0]), sizes) is None
    assert concentration(torch.tensor([80, 10, 5, 5, 0]), sizes) == pytest.approx(0.2)
    assert concentration(torch.tensor([80, 9, 5, 6, 0]), sizes) == pytest.approx(0.3)
    assert concentration(torch.tensor([0, 0, 0, 9, 91]), sizes) == pytest.approx(0.6)
    assert "needs 60% of the experts: the budget is under that" in said(0.6, 0.5)
    assert "a budget under that would cost" in said(0.6, 0.6)
