"""Mistakes in recurrent mixers' steps, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_recurrent
import test_recurrent_changes
import test_recurrent_ops
import torch
from planting import Defect, Patch, Test, instead, is_red, result

from hf_accel.kernels.native import NativeMixer
from hf_accel.ops import recurrent as ops
from hf_accel.recurrent import audit, delta, forms, patcher, ssd, step, trial
from hf_accel.recurrent.audit import Audited
from hf_accel.recurrent.step import MixerStep


def _unaudited(change: Callable[[Any], Any]) -> Defect:
    """Mixers have another form than they were audited with."""

    def plant(patch: Patch) -> None:
        right = patcher.MixerStep

        def wrong(module: Any, form: Any, *rest: Any) -> Any:
            return right(module, replace(form, **change(form)), *rest)

        patch.setattr(patcher, "MixerStep", wrong)

    return plant


def _on_copied_states(patch: Patch) -> None:
    right = NativeMixer.__call__

    def wrong(self: Any, rows: Any, conv: Any = None, state: Any = None, decay: Any = None) -> Any:
        return right(self, rows, conv, None if state is None else state.clone(), decay)

    patch.setattr(NativeMixer, "__call__", wrong)


def _without_the_bias(patch: Patch) -> None:
    right = ops.convolved
    patch.setattr(
        test_recurrent_ops, "convolved", lambda x, state, weight, bias, **how: right(x, state, weight, None, **how)
    )


def _with_projections(patch: Patch) -> None:
    patch.setattr(trial, "_record_projections", lambda *args: None)


def _of_dense(module: Any) -> tuple[int, int]:
    return forms.width_of(module) if type(module) is torch.nn.Linear else (0, 0)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "a convolution without silu": (
        _unaudited(lambda form: {"shape": replace(form.shape, is_silu=not form.shape.is_silu)}),
        test_recurrent.test_text_is_stocks,
    ),
    "states are not moved": (_on_copied_states, test_recurrent.test_prompts_go_on_from_the_states),
    "another eps": (
        _unaudited(lambda form: {"shape": replace(form.shape, beta_scale=1.1)}),
        test_recurrent.test_states_of_16_bits_are_near_stocks,
    ),
    "steps that stock takes": (
        instead(MixerStep, "output", lambda *_: None),
        test_recurrent.test_beams_reorder_the_states,
    ),
    "masks are not looked at": (
        instead(step, "_hides", lambda mask: False),
        test_recurrent.test_calls_that_are_no_plain_step_run_as_they_were,
    ),
    "packed products are no projections": (
        instead(ssd, "width_of", _of_dense),
        test_recurrent.test_packed_projections_are_called_as_they_are,
    ),
    "the class stays": (
        instead(patcher, "subclass", lambda mixin, original, **_: original),
        test_recurrent.test_all_steps_together,
    ),
    "changes are not seen": (
        instead(MixerStep, "is_current", lambda self, module: True),
        test_recurrent_changes.test_what_may_change_is_followed,
    ),
    "hooks are not seen": (
        instead(step.Watch, "is_hooked", lambda self: False),
        test_recurrent_changes.test_what_may_not_is_stocks,
    ),
    "functions are not watched": (
        instead(step.Surroundings, "look", lambda self: True),
        test_recurrent_changes.test_a_function_that_is_patched_is_seen,
    ),
    "no audit": (
        instead(audit, "_difference", lambda *_: 0.0),
        test_recurrent_changes.test_readings_that_differ_are_refused,
    ),
    "the first reading": (
        instead(Audited, "form", property(lambda self: next(iter(self.alive), None))),
        test_recurrent_changes.test_of_readings_that_cannot_be_told_apart_none_is_used,
    ),
    "unknown tensors are passed over": (
        instead(delta, "others_of", lambda module: []),
        test_recurrent_changes.test_a_tensor_that_no_reading_knows_is_refused,
    ),
    "no trial": (
        instead(patcher, "MARGIN", 9.0),
        test_recurrent_changes.test_mixers_that_are_not_faster_run_as_they_are,
    ),
    "projections are timed": (
        _with_projections,
        test_recurrent_changes.test_a_trial_leaves_projections_out_and_the_model_alone,
    ),
    "an audit without padding": (
        instead(audit, "PROMPT_TOKENS", 4),
        test_recurrent_changes.test_an_audit_reads_padded_rows_and_several_tokens,
    ),
    "every norm is known": (
        instead(forms.torch, "equal", lambda *_: True),
        test_recurrent_changes.test_norms_are_found_by_running_them,
    ),
    "a twin without a bias": (_without_the_bias, test_recurrent_ops.test_a_convolution_is_what_models_call),
    "gates of norms": (
        result(test_recurrent_ops, "gated_norm", lambda value: value * 1.001),
        test_recurrent_ops.test_norms_are_those_of_models_to_the_last_bit,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        patch.setattr(patcher, "share_of_time", lambda mixer, form: 0.0)
        defect(patch)
        assert is_red(test, served=test_recurrent.watched_steps(patch))
