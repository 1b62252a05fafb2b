"""Mistakes with inputs, recurrent states and images turn the tests of drafts red: a further table."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import test_following
import test_pictured_drafts
import test_recurrent_costs
import test_recurrent_drafts
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.core.calls import following
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.recurrent import Recall, RecurrentStates
from hf_accel.speculative import building, familiarity, governor, session
from hf_accel.speculative.familiarity import Familiarity
from hf_accel.speculative.proof import Proof
from hf_accel.speculative.session import SpeculativeSession


def only_the_next_token(patch: Patch) -> None:
    right = following._fits
    patch.setattr(
        following, "_fits", lambda found, inputs, ids, new, *rest: new > 2 or right(found, inputs, ids, new, *rest)
    )


def tensors_of_the_call(patch: Patch) -> None:
    def wrong(self: Any, model: Any, model_kwargs: Any, outputs: Any, input_ids: Any) -> None:
        self.model, self.outputs, self.prompt, self.kwargs = model, outputs, input_ids, model_kwargs

    patch.setattr(following._Asked, "__init__", wrong)


def read_again_for_nothing(patch: Patch) -> None:
    right = governor.choose
    patch.setattr(test_recurrent_costs, "choose", lambda *given: right(*given[:5]))


def rows_read_again_unseen(patch: Patch) -> None:
    right = SpeculativeSession.observe

    def wrong(self: Any, *given: Any, **more: Any) -> None:
        self._recall.reread = 0
        right(self, *given, **more)

    patch.setattr(SpeculativeSession, "observe", wrong)


def states_by_reference(patch: Patch) -> None:
    def wrong(self: Any) -> None:
        self._flags = []
        self._saved = [(owner, key, owner[key]) for owner, key in self._places()]

    patch.setattr(RecurrentStates, "save", wrong)


def nothing_read_again(patch: Patch) -> None:
    right = Recall.keep

    def wrong(self: Any, length: int, stop: int) -> int:
        kept = right(self, length, stop)
        self.unread = None
        return kept

    patch.setattr(Recall, "keep", wrong)


def proved_in_any_case(patch: Patch) -> None:
    right = building.prove

    def wrong(trials: Any) -> Proof:
        found = right(trials)
        found.obstacle = None
        return found

    patch.setattr(building, "prove", wrong)


def one_axis_of_positions(patch: Patch) -> None:
    right = Stepper._positions

    def wrong(self: Any, tokens: int) -> Any:
        found = right(self, tokens)
        return found[:1].expand(found.shape) if found.dim() == 3 else found

    patch.setattr(Stepper, "_positions", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "inputs that are not compared": (
        instead(following, "_fits", lambda *_: True),
        test_following.test_inputs_that_do_not_follow,
    ),
    "no look at the call's end": (only_the_next_token, test_following.test_inputs_that_change_at_a_length),
    "traces of asking": (
        instead(following, "_unchanged", lambda model: nullcontext()),
        test_following.test_a_method_that_leaves_traces_is_not_asked_ahead_of_time,
    ),
    "asking with the call's tensors": (
        tensors_of_the_call,
        test_following.test_a_method_that_writes_to_what_it_is_given,
    ),
    "new inputs that are not tried": (
        instead(Familiarity, "obstacle", lambda *_: None),
        test_following.test_steps_that_differ_with_new_inputs,
    ),
    "a trial that stays in the cache": (
        instead(familiarity, "_take_back", lambda *_: None),
        test_following.test_inputs_that_setting_up_did_not_try,
    ),
    "reading again is free": (read_again_for_nothing, test_recurrent_costs.test_no_call_loses_more_than_is_allowed),
    "rows that count as a plain step": (
        rows_read_again_unseen,
        test_recurrent_costs.test_what_is_read_again_is_booked_and_counted_as_rows,
    ),
    "more and more to read again": (
        instead(session, "MOST_UNREAD", 10**6),
        test_recurrent_costs.test_nothing_is_drafted_where_much_is_to_be_read_again,
    ),
    "states that stay": (
        instead(RecurrentStates, "give_back", lambda self: None),
        test_recurrent_drafts.test_steps_and_what_is_taken_back_of_them,
    ),
    "no copy of states": (states_by_reference, test_recurrent_drafts.test_steps_and_what_is_taken_back_of_them),
    "nothing read again": (nothing_read_again, test_recurrent_drafts.test_steps_and_what_is_taken_back_of_them),
    "a returned cache that lacks tokens": (
        instead(Stepper, "settle", lambda self: None),
        test_recurrent_drafts.test_returned_caches_hold_all_tokens,
    ),
    "states that begin anew": (
        proved_in_any_case,
        test_recurrent_drafts.test_where_several_tokens_are_read_as_a_beginning,
    ),
    "images at one axis": (one_axis_of_positions, test_pictured_drafts.test_the_text_is_stocks),
}


@pytest.mark.parametrize("title", PLANTED)
def test_each_mistake_turns_its_test_red(title: str, monkeypatch: Patch) -> None:
    plant, test = PLANTED[title]
    plant(monkeypatch)
    assert is_red(test)
