"""Mistakes with steps of several texts turn their tests red: a further table, see `test_planted.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_whole_steps_of_rows as tests
from planting import Defect, Patch, Test, instead, is_red, result

from hf_accel.kernels.native import NativeStep, StepMemory
from hf_accel.layers.stepping import StepRunner
from hf_accel.layers.trial import Extent

asked = tests.asked  # the fixture


def step(change: Callable[[Any, tuple[int, ...]], tuple[int, ...]]) -> Defect:
    """Steps are run at other positions."""

    def plant(patch: Patch) -> None:
        right = NativeStep.__call__
        patch.setattr(NativeStep, "__call__", lambda self, memory, *at: right(self, memory, *change(memory, at)))

    return plant


def place(change: Callable[..., tuple[Any, ...]]) -> Defect:
    """Layers are told other places."""

    def plant(patch: Patch) -> None:
        right = StepMemory.place
        patch.setattr(StepMemory, "place", lambda self, *given: right(self, *change(*given)))

    return plant


def one_past(index: int, keys: Any, values: Any, past: int, first: int, bits: Any, rows: Any = None) -> tuple[Any, ...]:
    if rows is not None:
        rows[:, 6] = rows[:, 6].min()  # within the memory of all
    return index, keys, values, past, first, bits, rows


def any_row(patch: Patch) -> None:
    """The choice of the first row is that of all."""
    right = NativeStep.__call__

    def wrong(self: Any, memory: Any, *positions: int) -> Any:
        logits = right(self, memory, *positions)
        memory.choice.copy_(memory.choice[:1].expand_as(memory.choice))
        return logits

    patch.setattr(NativeStep, "__call__", wrong)


def seen_anyway(patch: Patch) -> None:
    right = StepRunner._run
    patch.setattr(StepRunner, "_run", lambda self, state, sees_all: right(self, state, True))
    patch.setattr(StepRunner, "_lie_apart", lambda *_: True)


def never_apart(patch: Patch) -> None:
    right = StepRunner._run

    def wrong(self: Any, state: Any, sees_all: bool) -> bool:
        found = right(self, state, sees_all)
        state.is_apart = False
        return found

    patch.setattr(StepRunner, "_run", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "one choice for all": (any_row, tests.test_batches_get_stocks_texts),
    "one position for all": (step(lambda memory, at: at[:1] * memory.rows), tests.test_rows_in_caches_of_their_own),
    "one length for all": (place(one_past), tests.test_layers_one_by_one_give_the_same),
    "rows that see one another": (
        result(NativeStep, "__call__", lambda found: found if found is None else found + 0.1 * found.mean(0)),
        tests.test_rows_of_one_buffer,
    ),
    "padding that is not looked at": (seen_anyway, tests.test_which_batches_are_served),
    "more rows than were tried": (
        instead(Extent, "covers", lambda self, rows, columns: True),
        tests.test_which_batches_are_served,
    ),
    "no step but the first": (
        instead(StepRunner, "follow", lambda self, cache: None),
        tests.test_tokens_of_a_batch_follow_on_one_another,
    ),
    "tables that end": (
        step(lambda memory, at: tuple(min(position, 15) for position in at)),
        tests.test_more_positions_than_were_known_at_first,
    ),
    "rows that follow by themselves": (never_apart, tests.test_rows_in_caches_of_their_own_do_not_follow),
    "positions that are filled up": (
        step(lambda memory, at: (*at, *at[-1:] * (memory.rows - len(at)))),
        tests.test_as_many_positions_as_rows,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch, asked: None) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, asked=asked)
