"""Mistakes in goals beside configs, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

import pytest
import test_choosing
import test_goals_beside
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel import api
from hf_accel.core.calls.report import Speed
from hf_accel.core.steps.goal import Goal
from hf_accel.core.steps.plan import Plan
from hf_accel.decoding import choosing
from hf_accel.experts.offload.patcher import ExpertOffloadPatcher
from hf_accel.measure.quality import Quality
from hf_accel.ops import tolerances
from hf_accel.planner import joining
from hf_accel.planner.named import Asked, Named

PLANTED: dict[str, tuple[Defect, Test]] = {
    "the goal is planned for the original": (
        instead(Named, "first", property(lambda self: [])),
        test_goals_beside.test_whole_layers_run_on_packed_weights,
    ),
    "named steps are judged": (
        instead(Plan, "offered", property(lambda self: list(self.steps))),
        test_goals_beside.test_slow_steps_are_dropped_beside_configs_and_named_ones_stay,
    ),
    "packed weights are taken for exact ones": (
        instead(tolerances, "_TEXT_PACKED", 0.0),
        test_goals_beside.test_products_of_4_bits_round_what_they_read,
    ),
    "a named place is offered again": (
        instead(Named, "claims", property(lambda self: {})),
        test_goals_beside.test_a_named_place_is_not_claimed,
    ),
    "what is named is left out where it fails": (
        instead(Plan, "fixed", property(lambda self: set())),
        test_goals_beside.test_what_fails_of_the_goal_is_left_out_and_what_is_named_raises,
    ),
    "logits are compared with the original's alone": (
        instead(joining, "_reference", nothing),
        test_goals_beside.test_a_wrong_step_is_found_against_the_model_with_the_configs,
    ),
    "a lossy cache is not what steps are compared with": (
        instead(Named, "is_exact", True),
        test_goals_beside.test_a_lossy_cache_is_what_steps_are_compared_with,
    ),
    "steps of a plan forget that they were named": (
        instead(Plan, "named", property(lambda self: [])),
        test_goals_beside.test_a_plan_beside_configs_is_read_back_edited_and_applied,
    ),
    "quality says nothing of what it is against": (
        instead(Quality, "__str__", lambda self: ""),
        test_goals_beside.test_a_lossy_goal_is_bounded_against_the_model_with_the_configs,
    ),
    "experts are moved for a plan": (
        instead(ExpertOffloadPatcher, "moves_tensors", False),
        test_goals_beside.test_experts_in_a_file_are_moved_once_and_never_for_a_plan,
    ),
    "speed is told as stock's": (
        instead(Speed, "change", ""),
        test_goals_beside.test_whole_layers_run_on_packed_weights,
    ),
    "configs alone say nothing": (
        instead(api, "addition", nothing),
        test_goals_beside.test_configs_alone_say_what_a_goal_would_add,
    ),
    "kernels are timed to be told": (
        instead(Goal, "is_only_told", property(lambda self: False, lambda self, value: None)),
        test_goals_beside.test_nothing_is_timed_to_say_what_a_goal_would_add,
    ),
    "the first of two goals": (
        instead(Asked, "of", classmethod(lambda cls, value: cls("exact"))),
        test_goals_beside.test_lists_that_do_not_fit,
    ),
    "the last of equal scores": (
        instead(choosing, "best", lambda scores: scores.shape[-1] - 1 - scores.flip(-1).argmax(-1)),
        test_choosing.test_the_best_score,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch, tmp_path_factory: pytest.TempPathFactory) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("case"))
