"""Mistakes with passes over caches of several texts turn their test red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_merged_rows as tests
from merging import MergedLayer
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.kernels.native import NativeBlock


def rows_in_the_first(patch: Patch) -> None:
    right = NativeBlock.__call__

    def wrong(self: Any, *args: Any) -> Any:
        if args[-1] is not None:
            args[-1][:] = args[-1][:1]  # within its memory
        return right(self, *args)

    patch.setattr(NativeBlock, "__call__", wrong)


def a_token_too_few(patch: Patch) -> None:
    right = NativeBlock.__call__

    def wrong(self: Any, *args: Any) -> Any:
        rows = args[-1]
        if rows is not None:
            rows[:, 7] = (rows[:, 7] + 1).minimum(rows[:, 6])
        return right(self, *args)

    patch.setattr(NativeBlock, "__call__", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "one cache for all": (rows_in_the_first, tests.test_a_pass_over_caches_of_their_own),
    "a token that is not seen": (a_token_too_few, tests.test_a_pass_over_caches_of_their_own),
    "rows that are not counted": (
        instead(MergedLayer, "commit", lambda self, tokens: self.layers[0].commit(tokens)),
        tests.test_a_pass_over_caches_of_their_own,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test)
