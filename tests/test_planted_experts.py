"""Mistakes in running experts, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_experts
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel.core.model import experts as model_experts
from hf_accel.experts import implementation, patcher, router, statistics, step
from hf_accel.experts.router import RouterStep
from hf_accel.experts.step import ExpertsStep
from hf_accel.kernels.native import Gate, NativeExperts, Routing
from hf_accel.layers import block


def _called_with(change: Any) -> Defect:
    """Native calls are given other arguments."""

    def plant(patch: Patch) -> None:
        right = NativeExperts.__call__

        def wrong(self: Any, hidden: Any, ids: Any, weights: Any, **options: Any) -> Any:
            return right(self, *change(hidden, ids, weights), **options)

        patch.setattr(NativeExperts, "__call__", wrong)
        patch.setattr(patcher, "_audit", nothing)

    return plant


def _on_tokens_that_agree(patch: Patch) -> None:
    right = router._agree

    def wrong(found: Any, expected: Any, dtype: Any) -> bool:
        same = (found[2].sort(dim=1).values == expected[2].sort(dim=1).values).all(dim=1)
        return bool(same.any()) and right([x[same] for x in found], [x[same] for x in expected], dtype)

    patch.setattr(router, "_agree", wrong)


def _without_residual_factor(patch: Patch) -> None:
    patch.setattr(block, "with_feed_forward", lambda block, residual, normed: residual + block.feed_forward(normed))


PLANTED: dict[str, tuple[Defect, Test]] = {
    "weights of another token": (
        _called_with(lambda hidden, ids, weights: (hidden, ids, weights.roll(1, 0))),
        test_experts.test_text_is_stocks,
    ),
    "the second expert is left out": (
        _called_with(lambda hidden, ids, weights: (hidden, torch.where(ids == 1, 99, ids), weights)),
        test_experts.test_text_is_stocks,
    ),
    "no residual factor": (_without_residual_factor, test_experts.test_text_is_stocks),
    "the implementation is not put back": (
        instead(patcher, "_put_back", nothing),
        test_experts.test_text_is_stocks,
    ),
    "the user's choice is undone": (
        instead(patcher, "_put_back", lambda config, before: setattr(config, "_experts_implementation", before)),
        test_experts.test_the_users_choice_of_implementation_stays,
    ),
    "the configs of others": (
        instead(patcher, "own_configs", nothing),
        test_experts.test_a_model_of_the_same_config_is_left_alone,
    ),
    "copies name the implementation": (
        instead(implementation.ImplementationName, "__reduce_ex__", lambda self, _: (str, (str(self),))),
        test_experts.test_copies_are_stock,
    ),
    "changed weights are not seen": (
        instead(ExpertsStep, "_is_current", lambda self, module: True),
        test_experts.test_changed_weights_are_followed,
    ),
    "another implementation with gradients": (
        lambda patch: patch.setattr(implementation, "getattr", lambda *_: "grouped_mm", raising=False),
        test_experts.test_what_is_not_covered_runs_as_it_was_asked_for,
    ),
    "no audit": (instead(patcher, "_audit", nothing), test_experts.test_a_result_that_differs_is_refused),
    "every gate is silu": (
        instead(model_experts.torch, "allclose", lambda *_, **__: True),
        test_experts.test_an_unknown_gate_is_left_to_stock,
    ),
    "gates without bounds": (
        instead(model_experts, "_candidates", lambda module: [Gate("silu"), Gate("silu", 1.702)]),
        test_experts.test_forms_are_described,
    ),
    "weights of routers are not normed": (
        instead(RouterStep, "_found", lambda self, module: Routing(False, torch.float32, torch.float32)),
        test_experts.test_routers_return_what_they_returned,
    ),
    "routers that agree on some tokens": (
        _on_tokens_that_agree,
        test_experts.test_a_router_that_chooses_within_groups_is_left_alone,
    ),
    "logits of fewer digits": (
        instead(router.torch, "equal", lambda *_: True),
        test_experts.test_a_router_of_more_digits_than_its_weight_is_left_alone,
    ),
    "probes that saturate softmax": (
        instead(router, "_LARGEST_LOGIT", 1e5),
        test_experts.test_a_router_of_large_weights_is_told_from_one_without_norm,
    ),
    "a changed router is not seen": (
        instead(RouterStep, "_is_current", lambda self: True),
        test_experts.test_a_changed_router_is_followed,
    ),
    "a rank is an expert": (
        _called_with(lambda hidden, ids, weights: (hidden, ids.clamp(max=3), weights.clamp(min=0.1))),
        test_experts.test_ranks_of_other_processes_are_skipped,
    ),
    "rows of trials are counted": (
        instead(step, "request_in_progress", object),
        test_experts.test_calls_of_our_own_are_not_counted,
    ),
    "bytes of one expert": (
        instead(statistics.ExpertsStatistics, "bytes_per_token", 1),
        test_experts.test_rows_are_those_that_routers_send,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
