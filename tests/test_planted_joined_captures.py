"""Mistakes in steps that are captured for several calls: a table as that of `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_joined_captures
import test_shared_rows
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel.batching.admission import Admission
from hf_accel.batching.merged import MergedLayer
from hf_accel.batching.stopwatch import Stopwatch
from hf_accel.compilation import joint
from hf_accel.compilation.joint import JointSteps
from hf_accel.compilation.runner import StaticRunner
from hf_accel.compilation.shared import SharedRows, SharedSlot
from hf_accel.compilation.sharing import Sharing


def rows_of_another(patch: Patch) -> None:
    honest = joint._orders
    patch.setattr(joint, "_orders", lambda *args: (honest(*args)[0], honest(*args)[1].flip(0)))


def inputs_of_another(patch: Patch) -> None:
    honest = joint._orders
    patch.setattr(joint, "_orders", lambda *args: (honest(*args)[0].roll(1), honest(*args)[1]))


def all_advance(patch: Patch) -> None:
    honest = JointSteps._advance

    def wrong(self: Any, first: Any, calls: Any) -> None:
        taken = [(rows, rows.owner().layers) for rows in calls[0][0].shared.taken if rows.is_in_use()]
        honest(self, first, [(rows, layers) for rows, layers in taken if layers[0].slot is rows])

    patch.setattr(JointSteps, "_advance", wrong)


def padding_is_seen(patch: Patch) -> None:
    honest = SharedSlot.prepare
    patch.setattr(SharedSlot, "prepare", lambda self, rows, starts: honest(self, rows, None))


def windows_without_end(patch: Patch) -> None:
    honest = MergedLayer.__init__

    def wrong(self: Any, parts: Any, index: int) -> None:
        honest(self, parts, index)
        self.is_sliding = False

    patch.setattr(MergedLayer, "__init__", wrong)


def the_block_stays(patch: Patch) -> None:
    honest = StaticRunner.share

    def wrong(self: Any, rows: int, positions: int | None) -> Any:
        honest(self, rows, positions)
        return lambda: None

    patch.setattr(StaticRunner, "share", wrong)


def idle_rows_begin_anew(patch: Patch) -> None:
    patch.setattr(SharedSlot, "lengths_beside", lambda self, live, rows: [live.get(row, 0) for row in range(rows)])


def idle_rows_go_on(patch: Patch) -> None:
    def wrong(self: Any, live: dict[int, int], rows: int) -> list[int]:
        return [live.get(row, self.on_device[row]) for row in range(rows)]

    patch.setattr(SharedSlot, "lengths_beside", wrong)


def highest_first(patch: Patch) -> None:
    honest = SharedSlot.place_for

    def wrong(self: Any, rows: int) -> int | None:
        found = honest(self, rows)
        return None if found is None or self.taken else self.rows - rows

    patch.setattr(SharedSlot, "place_for", wrong)


JOINED, PARTS = test_joined_captures, test_shared_rows
PLANTED: dict[str, tuple[Defect, Test]] = {
    "rows in another order": (rows_of_another, JOINED.test_each_call_gets_the_text_that_it_gets_alone),
    "tokens of another call": (inputs_of_another, JOINED.test_each_call_gets_the_text_that_it_gets_alone),
    "padding that is seen": (padding_is_seen, JOINED.test_each_call_gets_the_text_that_it_gets_alone),
    "one call at a time": (
        instead(Sharing, "slot_with_room", nothing),
        JOINED.test_each_call_gets_the_text_that_it_gets_alone,
    ),
    "idle rows that begin anew": (idle_rows_begin_anew, JOINED.test_a_prompt_is_read_while_steps_write_to_its_row),
    "idle rows without end": (
        idle_rows_go_on,
        PARTS.test_rows_are_given_lowest_first_and_idle_ones_keep_what_they_hold,
    ),
    "all calls advance": (all_advance, JOINED.test_a_prompt_is_read_while_steps_write_to_its_row),
    "rows that are never free": (
        instead(SharedRows, "is_in_use", lambda self: True),
        JOINED.test_an_error_an_end_or_a_cancelled_call_changes_no_other,
    ),
    "rows that are taken from who kept them": (
        instead(SharedRows, "evict", nothing),
        JOINED.test_a_cache_that_was_kept_stays_as_it_was,
    ),
    "rows from the last on": (
        highest_first,
        PARTS.test_rows_are_given_lowest_first_and_idle_ones_keep_what_they_hold,
    ),
    "nobody waits for rows": (
        instead(Admission, "_has_room", lambda self, place: True),
        JOINED.test_calls_wait_for_rows,
    ),
    "every token goes through the host": (
        instead(JointSteps, "follow", nothing),
        JOINED.test_a_call_alone_goes_from_replay_to_replay,
    ),
    "windows without end": (
        windows_without_end,
        JOINED.test_a_capture_that_fails_leaves_steps_eager_and_merged,
    ),
    "buffers that stay": (the_block_stays, JOINED.test_after_the_block_calls_have_slots_of_their_own),
    "times of the host": (
        instead(Stopwatch, "now", lambda self: 0.0),
        PARTS.test_times_of_a_device_that_runs_behind_are_told_when_it_has_come_so_far,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_suite_sees_it(name: str) -> None:
    plant, test = PLANTED[name]
    with Patch.context() as patch:
        plant(patch)
        assert is_red(test)
