"""Mistakes in attention, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import test_attention_kernels
import test_attention_ladder
import test_bands
import test_first_use
import test_padded_prompts
import test_tiled
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.attention import (
    first_use,
    flash,
    grouped,
    held,
    ladder,
    masks,
    native,
    padded_prompts,
    patcher,
    sdpa,
    selftest,
    torch_flash,
    trials,
)
from hf_accel.attention.ladder import Ladder
from hf_accel.attention.names import BackEndName
from hf_accel.attention.question import Visible
from hf_accel.attention.statistics import AttentionStatistics
from hf_accel.core.calls import bands
from hf_accel.core.calls.bands import Band, BandMask
from hf_accel.ops import tiled


def _without(module: Any, name: str, keyword: str) -> Defect:
    """A function is called without one of its keywords."""

    def plant(patch: Patch) -> None:
        right = getattr(module, name)
        patch.setattr(module, name, lambda *args, **options: right(*args, **options | {keyword: None}))

    return plant


def _tiles_that_do_not_rescale(patch: Patch) -> None:
    right = torch.exp
    patch.setattr(tiled.torch, "exp", lambda x: right(x) if x.dim() == 4 else torch.ones_like(x))


def _rows_without_their_starts(patch: Patch) -> None:
    right = flash.ragged_rows

    def wrong(band: Band, device: torch.device) -> Any:
        return right(Band(band.tokens, band.positions, (0,) * len(band.starts), band.window, device), device)

    patch.setattr(flash, "ragged_rows", wrong)


def _windows_one_too_long(patch: Patch) -> None:
    right = sdpa._row
    patch.setattr(sdpa, "_row", lambda q, k, v, window, scale: right(q, k, v, window and window + 1, scale))


def _rows_before_their_padding(patch: Patch) -> None:
    right = padded_prompts._joined
    patch.setattr(padded_prompts, "_joined", lambda *args: tuple(x.roll(1, 2) for x in right(*args)))


KERNELS, LADDER = test_attention_kernels, test_attention_ladder


def _plans_are_shared_by_threads(patch: Patch) -> None:
    test_first_use.as_on_a_gpu(patch)
    patch.setattr(first_use.threading, "local", SimpleNamespace)


def _user_s_attention_is_passed_by(patch: Patch) -> None:
    test_first_use.as_on_a_gpu(patch)
    always = property(lambda self: first_use.FirstUse(), lambda self, value: None)
    patch.setattr(Ladder, "first_use", always, raising=False)


def _past_is_left_out(patch: Patch) -> None:
    test_first_use.as_on_a_gpu(patch)
    right = first_use.FirstUse.attend

    def wrong(self: Any, query: Any, key: Any, value: Any, visible: Any, scale: float) -> Any:
        return right(self, query, key[:, :, : query.shape[2]], value[:, :, : query.shape[2]], visible, scale)

    patch.setattr(first_use.FirstUse, "attend", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "plans are taken to be shared by threads": (
        _plans_are_shared_by_threads,
        test_first_use.test_a_length_is_served_until_a_plan_is_paid,
    ),
    "what a prompt follows is left out": (_past_is_left_out, test_first_use.test_what_is_no_whole_prompt_goes_on),
    "a user's attention is passed by at first": (
        _user_s_attention_is_passed_by,
        test_first_use.test_attention_that_a_user_registered_is_asked,
    ),
    "tiles do not rescale": (_tiles_that_do_not_rescale, test_tiled.test_equal_to_the_definition),
    "tiles see padding": (
        instead(tiled, "_hidden", lambda ends, columns, *_: (columns > ends)[None, None]),
        test_tiled.test_equal_to_the_definition,
    ),
    "sinks leave the output as it is": (
        instead(tiled, "with_sinks", lambda output, lse, sinks: (output, torch.logaddexp(lse, sinks[:, None]))),
        test_tiled.test_equal_to_the_definition,
    ),
    "windows one too long": (_windows_one_too_long, KERNELS.test_the_table),
    "the native kernel sees padding": (_without(native, "prompt_attention", "starts"), KERNELS.test_the_table),
    "rows without their starts": (_rows_without_their_starts, KERNELS.test_padding_costs_no_arithmetic),
    "sinks under another name": (
        instead(flash, "SINKS", ("softcap", "learnable_sink")),
        KERNELS.test_packages_are_called_as_their_signatures_ask,
    ),
    "self-tests without windows": (
        result(selftest, "_expected", lambda found: [each for each in found if "window" not in each[0].name]),
        KERNELS.test_self_tests_name_the_mask_and_the_figure,
    ),
    "self-tests look at the mean": (
        instead(selftest, "difference", lambda found, right: float((found - right).norm() / right.norm())),
        KERNELS.test_self_tests_name_the_mask_and_the_figure,
    ),
    "the operator is not compared": (
        instead(torch_flash, "tolerances", type("Any", (), {"of_attention": staticmethod(lambda dtype: 1e9)})),
        KERNELS.test_torchs_own_flash_attention_is_called_as_its_operator_asks,
    ),
    "soft caps are left out": (_without(native, "prompt_attention", "softcap"), LADDER.test_soft_caps),
    "copies name attention of ours": (
        instead(BackEndName, "__reduce_ex__", lambda self, _: (str, (str(self),))),
        LADDER.test_soft_caps,
    ),
    "weights are not returned": (
        instead(grouped.output_capturing, "_active_collector", type("Idle", (), {"get": staticmethod(dict)})),
        LADDER.test_soft_caps,
    ),
    "sinks are left out": (_without(native, "prompt_attention", "sinks"), LADDER.test_sinks),
    "prompts see padding": (instead(Visible, "starts", None), LADDER.test_prompts_are_stocks),
    "falls are not counted": (
        result(Ladder, "_plan", lambda plan: plan._replace(falls=())),
        LADDER.test_what_a_kernel_cannot_do_goes_down_and_is_counted,
    ),
    "a failure is forgotten": (
        instead(AttentionStatistics, "count", nothing),
        LADDER.test_a_kernel_that_fails_in_a_call_is_passed_by,
    ),
    "no self-test": (
        instead(ladder, "verdict", nothing),
        LADDER.test_a_kernel_that_is_wrong_is_refused_with_the_figure,
    ),
    "what is missing is not looked for": (
        instead(flash.FlashAttention, "missing", nothing),
        LADDER.test_refused_at_optimize,
    ),
    "any dtype": (
        instead(flash, "HALF", (torch.float32, torch.bfloat16)),
        LADDER.test_dtype_and_heads_of_a_named_back_end,
    ),
    "the shortest length for all": (
        instead(ladder, "_positions", lambda chosen: -chosen.positions),
        LADDER.test_auto_takes_what_was_faster_by_kind_and_length,
    ),
    "offered in any case": (
        instead(Ladder, "pays", True),
        LADDER.test_where_nothing_is_faster_it_is_not_offered,
    ),
    "noise is a gain": (instead(trials, "GAIN", 1.0), LADDER.test_trials_choose_what_is_shown_to_be_faster),
    "models are not audited": (
        instead(patcher.demands_of.__globals__["tolerances"], "of_attention", lambda dtype: 1e9),
        LADDER.test_a_models_own_attention_that_computes_something_else_is_kept,
    ),
    "codes are decoded": (instead(held, "_at_once", nothing), LADDER.test_prompts_over_codes_are_read_natively),
    "masks are made": (instead(masks, "described", nothing), LADDER.test_masks_are_bands_until_somebody_looks),
    "a band off by one": (
        instead(Band, "starts_tensor", property(lambda self: torch.tensor(self.starts) + 1)),
        test_bands.test_a_band_is_the_mask_it_stands_for,
    ),
    "everything is a band": (
        instead(bands, "_is_band", lambda *_: True),
        test_bands.test_what_is_no_band_is_left_alone,
    ),
    "holes are padding": (
        instead(bands, "starts_of", lambda padding: tuple(int(n) for n in (~padding).sum(-1))),
        test_bands.test_what_is_no_band_is_left_alone,
    ),
    "holes begin a row": (
        instead(bands, "starts_of", lambda padding: tuple(padding.int().argmax(-1).tolist())),
        test_bands.test_other_masks_of_models_stay_right,
    ),
    "a band has no memory": (
        lambda patch: patch.delattr(BandMask, "data_ptr"),
        test_bands.test_a_band_is_the_mask_it_stands_for,
    ),
    "masks of the user's are not asked": (
        instead(masks, "ALL_MASK_ATTENTION_FUNCTIONS", {}),
        test_bands.test_masks_of_the_users_own_making,
    ),
    "rows lie before their padding": (
        _rows_before_their_padding,
        test_padded_prompts.test_text_logits_and_later_steps_are_stocks,
    ),
    "rows are not as alone": (
        result(padded_prompts, "_joined", lambda found: (found[0] + 1e-7, found[1])),
        test_padded_prompts.test_rows_are_as_alone,
    ),
    "codes are not read": (
        instead(padded_prompts, "takes_states", lambda layer: True),
        test_padded_prompts.test_codes_are_read_by_the_pass_itself,
    ),
    "nothing is handed on": (instead(padded_prompts, "_obstacle", nothing), test_padded_prompts.test_handed_on),
    "rows apart in any case": (
        instead(padded_prompts, "LEAST_SAVED", -9.0),
        test_padded_prompts.test_batches_that_gain_nothing_are_read_whole,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
    selftest.verdict.cache_clear()
    trials.chosen.cache_clear()
