"""Mistakes in native steps of mixers, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_native_recurrent
from planting import Defect, Patch, Test, instead, is_red, result

from hf_accel.kernels import native
from hf_accel.kernels.native import recurrent


def _mixer_without(place: int) -> Defect:
    """One of a mixer's weights is not handed over."""

    def plant(patch: Patch) -> None:
        right = recurrent.MixerWeights.all

        def wrong(self: Any) -> Any:
            return tuple(None if index == place else tensor for index, tensor in enumerate(right(self)))

        patch.setattr(recurrent.MixerWeights, "all", wrong)

    return plant


def _rows_of_the_first(patch: Patch) -> None:
    right = recurrent.NativeMixer.__call__

    def wrong(self: Any, rows: Any, *states: Any) -> Any:
        return right(self, [row[:1].expand_as(row) for row in rows], *states)

    patch.setattr(recurrent.NativeMixer, "__call__", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "convolutions without a bias": (_mixer_without(1), test_native_recurrent.test_short_convolutions_equal_their_twin),
    "chunks that follow one another": (
        instead(recurrent.Span, "packed", lambda self: (self.source, self.start, self.count or 1, 0, self.count)),
        test_native_recurrent.test_delta_rules_equal_their_twin,
    ),
    "every sequence is the first": (_rows_of_the_first, test_native_recurrent.test_mamba2_equals_its_twin),
    "scans without d": (_mixer_without(4), test_native_recurrent.test_scans_equal_their_twin),
    "no word of what does not fit": (
        result(recurrent.NativeMixer, "__call__", lambda out: False if out is None else out),
        test_native_recurrent.test_what_does_not_fit_is_refused_and_nothing_is_written,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
