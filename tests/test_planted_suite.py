"""Mistakes in suites of measurements, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_suite
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel.api import optimize
from hf_accel.cli import gpu_works
from hf_accel.cli.gpu_works import GpuWorks
from hf_accel.core.calls.hosting import host_of
from hf_accel.measure.suite import Suite


def optimised_for_good(patch: Patch) -> None:
    class Entered:
        def __init__(self, model: Any, plan: Any) -> None:
            self.model = model

        def __enter__(self) -> Any:
            return self.model if host_of(self.model) else optimize(self.model)

        def __exit__(self, *error: object) -> None: ...

    patch.setattr(gpu_works, "optimized", Entered)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "nothing is written": (
        instead(Suite, "_write", nothing),
        test_suite.test_every_work_is_made_once_and_a_second_run_goes_on,
    ),
    "failures stay": (
        instead(Suite, "resume", lambda self: None),
        test_suite.test_what_fails_is_a_row_that_says_so_and_is_made_again,
    ),
    "a floor of the original's bytes": (
        instead(GpuWorks, "_floor_ms", lambda self: 1.0),
        test_suite.test_the_works_of_the_gpu_suite_run_and_their_figures_are_of_one_piece,
    ),
    "the model stays optimised": (
        optimised_for_good,
        test_suite.test_the_works_of_the_gpu_suite_run_and_their_figures_are_of_one_piece,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch, tmp_path_factory: pytest.TempPathFactory) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("case"))
