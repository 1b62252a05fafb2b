"""Mistakes with prompts through native layers turn their tests red: a further table, see `test_planted.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import test_prompts
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock
from hf_accel.layers import audit, block, guard, trial


def one_size_too_many(patch: Patch) -> None:
    right = trial.rows_that_pay
    patch.setattr(
        test_prompts,
        "rows_that_pay",
        lambda few, seconds: min((s for s in trial.SIZES if s > right(few, seconds)), default=512),
    )


def sizes_without_end(patch: Patch) -> None:
    patch.setattr(trial, "BUDGET_S", 1e9)


def gains_that_show_once(patch: Patch) -> None:
    right, gains = trial._pays, set()

    def wrong(rows: int, seconds: Any) -> tuple[bool, float]:
        pays, took = (True, 0.0) if rows in gains else right(rows, seconds)
        gains.update([rows] if pays else [])
        return pays, took

    patch.setattr(trial, "_pays", wrong)


def no_size_between(patch: Patch) -> None:
    right = trial._pays
    patch.setattr(trial, "_pays", lambda rows, seconds: right(rows, seconds) if rows in trial.SIZES else (False, 0.0))


def padding_in_sight(patch: Patch) -> None:
    """Many rows see the padding before them."""
    call = NativeBlock.__call__

    def wrong(
        self: Any, hidden: Any, cos: Any, sin: Any, keys: Any, values: Any, past: int, first: int, mask: Any, *rest: Any
    ) -> Any:
        if mask is not None and hidden.shape[0] * hidden.shape[1] > native.MAX_ROWS:
            mask = mask.clone()
            mask[..., 0] = True
        return call(self, hidden, cos, sin, keys, values, past, first, mask, *rest)

    patch.setattr(NativeBlock, "__call__", wrong)


def all_rows(patch: Patch) -> None:
    patch.setattr(guard.Extent, "covers", lambda self, rows, columns: True)


def never_prompts(patch: Patch) -> None:
    patch.setattr(block, "PROMPT_TOKENS", audit.TOKENS)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "a size that lost": (one_size_too_many, test_prompts.test_the_limit_is_the_last_size_that_paid),
    "a gain that showed once": (
        gains_that_show_once,
        test_prompts.test_a_gain_that_another_program_made_is_looked_at_again,
    ),
    "a trial without end": (sizes_without_end, test_prompts.test_large_layers_are_tried_as_far_as_the_budget_goes),
    "long calls count for many": (
        instead(trial, "_cost", lambda pair: 6 * pair),
        test_prompts.test_large_layers_are_tried_as_far_as_the_budget_goes,
    ),
    "long calls again and again": (
        instead(trial, "time", SimpleNamespace(perf_counter=lambda: 0.0)),
        test_prompts.test_long_calls_are_made_once,
    ),
    "no size between": (no_size_between, test_prompts.test_the_size_halfway_before_a_loss_is_tried_too),
    "calls that were not tried": (all_rows, test_prompts.test_many_rows_run_natively_as_far_as_the_trial_went),
    "padding that many rows see": (padding_in_sight, test_prompts.test_prompts_are_as_exact_as_stocks),
    "an audit of few rows alone": (never_prompts, test_prompts.test_the_audit_sees_prompts),
    "masks of any form": (
        instead(guard, "masks_of", lambda name: "boolean"),
        test_prompts.test_layers_with_masks_of_another_form_serve_few_rows,
    ),
    "transposed weights like others": (
        instead(block, "lies_transposed", lambda block: False),
        test_prompts.test_products_of_transposed_weights_are_tried_from_seventeen_rows,
    ),
    "a trial of a single round": (
        instead(trial, "ROUNDS", 1),
        test_prompts.test_a_trial_times_both_ways_and_leaves_the_model_alone,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    monkeypatch.setattr(block, "tried_rows", lambda few, key, pairs: 256)
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, pays=None)
