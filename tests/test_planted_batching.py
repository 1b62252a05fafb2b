"""Mistakes in bringing calls together: a table as that of `test_planted.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import test_batching
import test_joined_calls
import torch
from planting import Defect, Patch, Test, is_red

from hf_accel.batching import merged, passes, patcher
from hf_accel.batching.admission import Admission
from hf_accel.batching.engine import Engine
from hf_accel.batching.meeting import Meeting
from hf_accel.batching.merged import MergedLayer, Part
from hf_accel.batching.pace import Pace
from hf_accel.batching.statistics import BatchingStatistics
from hf_accel.batching.turn import Turn
from hf_accel.compilation.sharing import Claim
from hf_accel.core.calls import seeding
from hf_accel.core.calls.cancelling import check_wanted


def rows_of_the_next(patch: Patch) -> None:
    honest = passes._share

    def wrong(outputs: Any, batch: Any) -> None:
        outputs.logits = outputs.logits.roll(1, 0)
        outputs["choices"] = None
        honest(outputs, batch)

    patch.setattr(passes, "_share", wrong)


def padding_is_seen(patch: Patch) -> None:
    patch.setattr(Part, "mask", lambda self, *args: None)
    honest = merged._places
    patch.setattr(merged, "_places", lambda part, *args: honest(Part(part.cache, part.rows, None), *args))


def caches_are_shared(patch: Patch) -> None:
    honest = MergedLayer.__init__

    def wrong(self: Any, parts: list[Part], index: int) -> None:
        honest(self, parts, index)
        self._parts = [(part, parts[0].cache.layers[index]) for part in parts]

    patch.setattr(MergedLayer, "__init__", wrong)


def everybody_hears_of_errors(patch: Patch) -> None:
    leave, lead = Meeting.leave, Meeting._lead

    def left(self: Any) -> None:
        leave(self)
        self.is_spoilt = True

    def wrong(self: Any, batch: Any) -> None:
        lead(self, batch)
        for submission in batch:
            submission.error = RuntimeError("of another") if hasattr(self, "is_spoilt") else None

    patch.setattr(Meeting, "leave", left)
    patch.setattr(Meeting, "_lead", wrong)


def hooks_see_batches(patch: Patch) -> None:
    patch.setattr("hf_accel.batching.engine.joining_obstacle", lambda call: None)


def seeds_are_torchs(patch: Patch) -> None:
    patch.setattr(seeding.Seeded, "on", lambda self, device: torch.default_generator)


def nobody_goes_ahead(patch: Patch) -> None:
    patch.setattr(Admission, "_may_enter", lambda self, place: self._waiting[0] is place and self._has_room(place))


def all_go_ahead(patch: Patch) -> None:
    patch.setattr("hf_accel.batching.admission.PASSED", 10**9)


def latest_first(patch: Patch) -> None:
    patch.setattr(Turn, "_next", lambda self: self._waiting[-1])


def all_rows_at_once(patch: Patch) -> None:
    patch.setattr(Pace, "most_rows", lambda self: self._max_rows)


def places_are_kept(patch: Patch) -> None:
    patch.setattr(Admission, "leave", lambda self, place: None)


def whole_prompts(patch: Patch) -> None:
    patch.setattr(Engine, "_chunk", lambda self, call: None)


def the_class_stays(patch: Patch) -> None:
    honest = patcher.begin

    def wrong(model: Any, host: Any, config: Any, journal: Any) -> Any:
        engine = honest(model, host, config, journal)
        journal._undo.pop()
        return engine

    patch.setattr("hf_accel.batching.scope.begin", wrong)


def reasons_are_lost(patch: Patch) -> None:
    honest = BatchingStatistics.began
    patch.setattr(BatchingStatistics, "began", lambda self, reason, waited: honest(self, None, waited))


def no_one_is_late(patch: Patch) -> None:
    patch.setattr(Meeting, "_left", lambda self: 0.0)


class Nobody:
    """A list of engines that stays empty."""

    def add(self, engine: Any) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(())


def children_inherit(patch: Patch) -> None:
    patch.setattr("hf_accel.batching.engine._engines", Nobody())


def nobody_is_told(patch: Patch) -> None:
    patch.setattr("hf_accel.batching.seat.check_wanted", lambda: None)
    patch.setattr("hf_accel.batching.engine.check_wanted", lambda: None)


def targets_are_for_half(patch: Patch) -> None:
    patch.setattr("hf_accel.batching.pace._mostly", statistics.median)


def whoever_runs_the_step_is_asked(patch: Patch) -> None:
    honest = Engine.passing

    @contextmanager
    def wrong(self: Engine, tokens: int) -> Iterator[None]:
        check_wanted()
        with honest(self, tokens):
            yield

    patch.setattr(Engine, "passing", wrong)


def hooks_are_looked_for_at_first(patch: Patch) -> None:
    patch.setattr("hf_accel.batching.engine.hooks_of", lambda model: [])


def all_layers_are_placed(patch: Patch) -> None:
    patch.setattr(merged, "hasattr", lambda layer, name: True, raising=False)


def nobody_is_taken_along(patch: Patch) -> None:
    patch.setattr(Meeting, "gather", lambda self, batch: None)


def interrupts_are_for_all(patch: Patch) -> None:
    honest = Meeting._lead

    def wrong(self: Any, batch: Any) -> None:
        try:
            honest(self, batch)
        except BaseException as error:
            for submission in batch:
                submission.error, submission.is_done = error, True
                submission.wake()
            raise

    patch.setattr(Meeting, "_lead", wrong)


def failures_are_hidden(patch: Patch) -> None:
    patch.setattr(BatchingStatistics, "fell_apart", lambda self, reason: None)


def buffers_for_all(patch: Patch) -> None:
    patch.setattr(Claim, "has_room", lambda self, joins: True)


JOINED, PARTS = test_joined_calls, test_batching
PLANTED: dict[str, tuple[Defect, Test]] = {
    "rows of another call": (rows_of_the_next, JOINED.test_each_call_gets_the_text_that_it_gets_alone),
    "padding that is seen": (padding_is_seen, JOINED.test_calls_of_several_padded_rows_join),
    "one cache for all": (caches_are_shared, JOINED.test_every_call_keeps_its_own_cache),
    "an error for everybody": (everybody_hears_of_errors, JOINED.test_an_error_or_an_end_of_one_call_changes_no_other),
    "hooks that see batches": (hooks_see_batches, JOINED.test_hooked_modules_see_their_call_alone),
    "reasons that are lost": (reasons_are_lost, JOINED.test_what_cannot_join_runs_beside_the_batch_with_its_reason),
    "prompts that are read whole": (whole_prompts, JOINED.test_prompts_are_read_in_chunks_beside_others),
    "places that are kept": (places_are_kept, JOINED.test_an_error_or_an_end_of_one_call_changes_no_other),
    "a class that stays": (the_class_stays, JOINED.test_the_model_is_as_it_was_after_the_block),
    "draws from torch's generator": (
        seeds_are_torchs,
        PARTS.test_a_seed_is_that_of_torch_and_leaves_torchs_own_generator,
    ),
    "nobody passes anybody": (
        nobody_goes_ahead,
        PARTS.test_admission_is_first_come_first_served_and_passes_nobody_for_ever,
    ),
    "somebody waits for ever": (
        all_go_ahead,
        PARTS.test_admission_is_first_come_first_served_and_passes_nobody_for_ever,
    ),
    "the latest first": (
        latest_first,
        PARTS.test_prompts_and_steps_take_turns_and_prompts_keep_the_order_of_their_calls,
    ),
    "all rows whatever they take": (all_rows_at_once, PARTS.test_rows_and_chunks_follow_from_measured_times),
    "steps that wait for nobody": (no_one_is_late, PARTS.test_whoever_comes_last_runs_the_step_for_all),
    "steps without who has come": (
        nobody_is_taken_along,
        PARTS.test_whoever_comes_while_a_step_waits_for_its_turn_is_in_it,
    ),
    "an interrupt for all": (
        interrupts_are_for_all,
        PARTS.test_an_interrupt_of_whoever_runs_a_step_is_not_for_the_others,
    ),
    "failures that are hidden": (
        failures_are_hidden,
        JOINED.test_a_pass_that_fails_is_told_and_each_call_makes_its_own,
    ),
    "a child that waits for its parents' threads": (
        children_inherit,
        PARTS.test_a_forked_child_begins_with_nobody_inside,
    ),
    "a cancellation for all": (
        whoever_runs_the_step_is_asked,
        JOINED.test_whoever_runs_a_step_may_be_cancelled_in_it_without_harm_to_the_others,
    ),
    "hooks that are looked for at first": (
        hooks_are_looked_for_at_first,
        JOINED.test_hooks_that_come_in_the_middle_see_their_call_alone,
    ),
    "padding of layers that do not say where they begin": (
        all_layers_are_placed,
        JOINED.test_every_call_keeps_its_own_cache,
    ),
    "a target for half of the tokens": (targets_are_for_half, PARTS.test_a_target_is_for_nine_in_ten_tokens),
    "calls that take one another's buffers": (
        buffers_for_all,
        JOINED.test_calls_that_cannot_share_captured_steps_run_one_after_the_other,
    ),
    "calls that go on unwanted": (nobody_is_told, PARTS.test_asyncio_calls_join_and_are_cancelled),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_suite_sees_it(name: str) -> None:
    plant, test = PLANTED[name]
    with Patch.context() as patch:
        plant(patch)
        assert is_red(test)
