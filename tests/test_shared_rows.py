"""What steps captured for several calls rest on: rows of shared buffers, times of devices that run behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_accel.batching.stopwatch import Stopwatch
from hf_accel.compilation import shared
from hf_accel.compilation.shared import SharedSlot
from hf_accel.core.calls.call import Request

CPU = torch.device("cpu")


def test_rows_are_given_lowest_first_and_idle_ones_keep_what_they_hold() -> None:
    slot, calls = SharedSlot(6, 64, None, CPU), [Request() for _ in range(4)]
    caches = [type("Cache", (), {"layers": []})() for _ in range(4)]
    taken: list[Any] = [slot.take(rows, caches[at], calls[at], 40) for at, rows in enumerate((2, 1, 2))]
    assert [(rows.first, rows.stop) for rows in taken] == [(0, 2), (2, 3), (3, 5)]
    assert slot.take(2, caches[3], calls[3], 40) is None
    taken[1].release()
    assert slot.place_for(2) is None, "one is free in the middle, one at the end"
    assert slot.place_for(1) == 2
    slot.prepare(taken[2], torch.tensor([3, 0]))
    layer = type("Layer", (), {"length": 9, "slot": taken[0]})()
    caches[0].layers.append(layer)
    # a row of a call keeps its length, a padded one is never without a column that is seen, a free one goes on
    assert slot.lengths_beside({2: 30}, 6) == [9, 9, 30, 3, 0, 0]
    slot.on_device[:] = [10, 9, 30, 63, 64, 7]
    assert slot.lengths_beside({2: 30}, 6) == [10, 9, 30, 63, 0, 7]


def test_a_capture_has_the_rows_of_all_and_fewer_where_these_are_asked_for_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared, "OFTEN", 3)
    slot, calls = SharedSlot(6, 64, None, CPU), [Request(), Request()]
    caches = [type("Cache", (), {"layers": []})() for _ in calls]
    taken = [slot.take(rows, cache, call, 40) for rows, cache, call in zip((1, 2), caches, calls, strict=True)]
    assert slot.first(1).rows == 4, "the other call is about to write"
    slot.first(1).graphs["step"] = None
    taken[1].release()  # type: ignore[union-attr]
    assert [slot.first(1).rows for _ in range(3)] == [4, 1, 1]
    assert slot.first(5).rows == 6


def test_times_of_a_device_that_runs_behind_are_told_when_it_has_come_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        done, count = 0, 0

        def __init__(self, enable_timing: bool) -> None:
            Event.count += 1
            self.number = Event.count

        def record(self, stream: Any) -> None: ...

        def query(self) -> bool:
            return self.number <= Event.done

        def elapsed_time(self, other: Any) -> float:
            return float(1000 * (other.number - self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    watch, told = Stopwatch(torch.device("cuda")), []
    watch.tell(watch.now(), watch.now(), told.append)
    assert told == []
    Event.done = 3
    watch.tell(watch.now(), watch.now(), told.append)
    assert told == [1.0]
