"""Mistakes with steps of a whole model turn their tests red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_whole_steps as tests
from planting import Defect, Patch, Test, instead, is_red, result

from hf_accel.core.model.discovery.hollow import Hollow
from hf_accel.decoding.writing import Writing
from hf_accel.kernels import native
from hf_accel.layers import step_guard
from hf_accel.layers.step_guard import StepGuard
from hf_accel.layers.stepping import StepRunner


def no_look_at_the_mask(patch: Patch) -> None:
    right = StepRunner._served
    patch.setattr(StepRunner, "_served", lambda self, inputs: right(self, inputs | {"attention_mask": None}))


def no_token_ends(patch: Patch) -> None:
    right = Writing.__init__

    def wrong(self: Any, call: Any) -> None:
        right(self, call)
        self._end_ids = self._end_ids and frozenset([0])

    patch.setattr(Writing, "__init__", wrong)


def without_norm(patch: Patch) -> None:
    right = native.NativeStep.__init__

    def wrong(self: Any, blocks: Any, ends: Any, angles: Any) -> None:
        right(self, blocks, native.StepEnds(**{**vars(ends), "norm": None}), angles)

    patch.setattr(native.NativeStep, "__init__", wrong)
    patch.setattr(step_guard, "prove", lambda *_: None)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "a step without the last norm": (without_norm, tests.test_greedy_and_sampled_texts_are_stocks),
    "padding that is not looked at": (no_look_at_the_mask, tests.test_what_is_asked_for_is_given),
    "an end of text that is overlooked": (no_token_ends, tests.test_what_is_asked_for_is_given),
    "changes that are not looked for": (
        instead(StepGuard, "_holds", lambda self, request: True),
        tests.test_changes_between_calls_are_seen,
    ),
    "hooks that are not looked for": (
        instead(StepGuard, "is_in_place", lambda self: True),
        tests.test_hooks_are_called,
    ),
    "tables that end": (
        instead(StepGuard, "longer", lambda self, position: None),
        tests.test_more_positions_than_were_known_at_first,
    ),
    "angles of the position before": (
        result(Hollow, "angles", lambda found: [p and tuple(t.roll(1, 0) for t in p) for p in found]),
        tests.test_greedy_and_sampled_texts_are_stocks,
    ),
    "no step at all": (
        instead(StepRunner, "_served", lambda self, inputs: None),
        tests.test_packed_and_tied_heads,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test)
