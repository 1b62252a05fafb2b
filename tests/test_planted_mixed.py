"""Mistakes in choosing bits, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_goals_calibrated
import test_mixed
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.quantization import candidates, mixed
from hf_accel.quantization.allocating import allocation, groups, sensitivity

PLANTED: dict[str, tuple[Defect, Test]] = {
    "the cheapest option of each group": (
        instead(allocation, "_exact", lambda groups, *_: [0] * len(groups)),
        test_mixed.test_the_best_of_all_choices_is_found,
    ),
    "siblings apart": (
        instead(groups, "SIBLING_NAMES", ()),
        test_mixed.test_products_that_run_together_are_one_group,
    ),
    "the weights of another group": (
        instead(sensitivity, "put_weights", nothing),
        test_mixed.test_the_cost_of_a_group_is_the_divergence_with_it_alone,
    ),
    "what another layer reads": (
        instead(sensitivity, "cycle", lambda reads: iter(reads[:1] * 1000)),
        test_mixed.test_the_cost_of_a_group_is_the_divergence_with_it_alone,
    ),
    "a budget that is not kept": (
        result(mixed.MixedPrecisionPatcher, "_budget", lambda budget: int(1.3 * budget)),
        test_mixed.test_a_budget_of_bytes_is_kept_on_any_architecture,
    ),
    "no end of solving": (
        instead(candidates, "MOST_CALIBRATING_S", 1e9),
        test_goals_calibrated.test_what_takes_too_long_is_not_begun,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
