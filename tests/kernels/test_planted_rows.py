"""Calls over buffers of their own that are a little off turn their tests red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_native_rows as tests
from planting import Defect, Patch, is_red

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock


def with_rows(change: Callable[[Any], Any], tidy: Callable[[Any], Any] = lambda found: found) -> Defect:
    """The kernel is given what `change` makes of the table of rows, and the result is what `tidy` makes of it."""

    def plant(patch: Patch) -> None:
        right = NativeBlock.__call__

        def wrong(self: Any, *args: Any, rows: Any = None, **kwargs: Any) -> Any:
            if rows is None:
                return right(self, *args, **kwargs)
            return tidy(right(self, *args, rows=change(rows.clone()), **kwargs))

        patch.setattr(NativeBlock, "__call__", wrong)

    return plant


def filled(field: int, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(rows: Any) -> Any:
        rows[:, field] = value(rows[:, field])
        return rows

    return change


def of_many(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda found: change(found) if found is not None and len(found) > native.MAX_ROWS else found


def first_of_all(rows: Any) -> Any:
    return rows[:1].expand(len(rows), -1).contiguous()


PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "one first for all": (
        with_rows(filled(7, lambda first: first.min())),
        tests.test_every_row_is_bit_equal_to_that_row_alone,
    ),
    "one buffer for all": (with_rows(first_of_all), tests.test_every_row_is_bit_equal_to_that_row_alone),
    "keys where values are": (
        with_rows(lambda rows: rows[:, [1, 0, 4, 5, 2, 3, 6, 7]].contiguous()),
        tests.test_rows_of_codes,
    ),
    "many rows in another order": (
        with_rows(lambda rows: rows, of_many(lambda found: found * 1.02)),
        tests.test_any_number_of_threads_and_of_passes,
    ),
    "parts of many rows": (
        with_rows(lambda rows: rows, lambda found: tuple(part.flip(0) for part in found)),
        tests.test_parts_of_layers,
    ),
    "a position less": (
        with_rows(filled(6, lambda past: (past - 1).clamp_min(0))),
        tests.test_one_buffer_by_rows_is_the_plain_call,
    ),
    "scores that are not looked at": (
        with_rows(lambda rows: rows, lambda found: 0 if found is None else found),
        tests.test_scores_that_are_not_finite_end_the_call,
    ),
    "rows that are made to fit": (
        with_rows(first_of_all),
        tests.test_rows_out_of_range_are_refused,
    ),
    "any table": (
        with_rows(lambda rows: rows.new_zeros(2, 8) if rows.shape != (2, 8) else rows.long().contiguous()),
        tests.test_tables_of_another_kind_are_refused,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
