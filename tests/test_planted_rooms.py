"""Mistakes in setting up, rounding, observing and the rooms of the cache: the second table, see `test_planted.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_applying
import test_cache_bounds
import test_cli_convert_gqa
import test_cli_quantize
import test_cli_uptrain
import test_demo_model
import test_documents
import test_doors
import test_gqa
import test_gqa_algebra
import test_gqa_architectures
import test_gqa_errors
import test_gqa_heads
import test_gqa_mathematics
import test_gqa_texts
import test_native_prefill
import test_observing
import test_prefix_calls
import test_prefix_files
import test_rounding
import test_tiers_prefetch
import test_trained_models
import test_uptrain
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing, result
from transformers import AutoTokenizer

from hf_accel.assets import demo_path
from hf_accel.cache.prefix import format
from hf_accel.cache.tiers.staging import Staging
from hf_accel.cli import quantize
from hf_accel.cli import uptrain as uptrain_command
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.keywords import KEYWORDS, Keyword
from hf_accel.core.recent import Recent
from hf_accel.core.steps.setting import Setting
from hf_accel.decoding import choosing
from hf_accel.gqa import (
    alignment,
    conversion,
    converting,
    grouping,
    layouts,
    maps,
    patcher,
    preview,
    repair,
    stacks,
    text,
)
from hf_accel.gqa.architectures import parallel, table
from hf_accel.kernels import native
from hf_accel.measure.documents import Reader
from hf_accel.measure.quality import CalibrationText
from hf_accel.quantization import observing
from hf_accel.quantization.rounding import METHODS
from hf_accel.recipes import trainer


def rolled_codes(patch: Patch) -> None:
    nearest = METHODS["nearest"]

    def wrong(*arguments: Any) -> Any:
        found = nearest(*arguments)
        found.codes.copy_(found.codes.roll(1, 1))
        return found

    patch.setitem(METHODS, "nearest", wrong)


def the_last_position_only(self: observing.Moment, inputs: torch.Tensor) -> None:
    rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()[-1:]
    self.total.addmm_(rows.T, rows)
    self.count += inputs.numel() // inputs.shape[-1]


def every_call_reuses(patch: Patch) -> None:
    kept = KEYWORDS["kv_cache"]
    patch.setitem(KEYWORDS, "kv_cache", Keyword("kv_cache", lambda model, value, arguments: None, kept.doors))


def products_too_large(patch: Patch) -> None:
    linear = native.linear
    patch.setattr(native, "linear", lambda *arguments, **options: 1.01 * linear(*arguments, **options))


def the_least_likely_token(patch: Patch) -> None:
    patch.setattr(choosing, "choose_token", lambda scores, samples: scores.argmin(-1))


def keys_and_values_exchanged(patch: Patch) -> None:
    known = layouts.FUSED["GPT2Attention"]

    def wrong(*arguments: Any) -> Any:
        q, k, v = known.order(*arguments)
        return q, v, k

    patch.setitem(layouts.FUSED, "GPT2Attention", replace(known, order=wrong))


def queries_not_turned_back(patch: Patch) -> None:
    share = alignment._KeyPart.share
    patch.setattr(alignment._KeyPart, "share", lambda self, members, q, k: share(self, members, q.clone(), k))


def norms_without_their_bias(patch: Patch) -> None:
    patch.setattr(table.tolerances, "of_step_logits", lambda *_: 1.0)
    patch.setattr(parallel, "folded", lambda weight, bias, norm: (weight * norm.weight, bias))


def measured_on_what_was_fitted(patch: Patch) -> None:
    honest = text.texts_for
    patch.setattr(preview, "texts_for", lambda *given: (honest(*given)[0],) * 2)


def padding_is_read(patch: Patch) -> None:
    ids = Reader._ids
    patch.setattr(Reader, "_ids", lambda self, value, mask=None: ids(self, value))


PLANTED: dict[str, tuple[Defect, Test]] = {
    "weights read again and again": (
        instead(Setting, "prepared_for", lambda self, module: {}),
        test_applying.test_no_weight_is_read_for_checking_more_than_once,
    ),
    "who stands at a door stays": (
        instead(Host, "stand", lambda self, door, who: self.doors.__setitem__(door, who)),
        test_doors.test_undoing_puts_back_who_stood_there,
    ),
    "inputs seen once only": (
        instead(observing.Moment, "add", the_last_position_only),
        test_observing.test_moments_equal_a_textbook,
    ),
    "codes of the neighbours": (rolled_codes, test_rounding.test_a_model_holds_the_codes_of_nearest),
    "configs without a bound": (
        instead(Recent, "put", lambda self, key, value: self._entries.__setitem__(key, value)),
        test_cache_bounds.test_recent,
    ),
    "a layout misread": (keys_and_values_exchanged, test_gqa_heads.test_values_of_heads_are_those_of_the_cache),
    "numbers of the old config": (
        instead(conversion, "_carry_numbers", nothing),
        test_gqa_heads.test_more_heads_and_then_fewer,
    ),
    "queries not turned back": (
        queries_not_turned_back,
        test_gqa_algebra.test_equal_heads_are_found_and_lose_nothing,
    ),
    "neighbours share": (
        instead(alignment, "balanced", lambda heads, groups, cost: grouping.neighbours(heads, groups)),
        test_gqa_algebra.test_other_ratios,
    ),
    "losses that are too large": (
        result(stacks.Stack, "lost", lambda lost: 1.01 * lost),
        test_gqa_mathematics.test_what_is_lost_is_what_singular_values_say,
    ),
    "a repair that is left out": (
        instead(repair, "EXACT", 10.0),
        test_gqa_mathematics.test_repair_never_makes_it_worse,
    ),
    "a config that others share": (
        instead(patcher, "own_configs", lambda model, journal: [model.config]),
        test_gqa.test_everything_comes_back,
    ),
    "measured on what was fitted": (
        measured_on_what_was_fitted,
        test_gqa.test_a_preview_tells_what_comes,
    ),
    "numbers that are none": (
        instead(converting, "_check_finite", nothing),
        test_gqa_errors.test_weights_that_are_no_numbers,
    ),
    "norms without their bias": (
        norms_without_their_bias,
        test_gqa_architectures.test_the_same_logits_and_the_same_text,
    ),
    "a text that is none": (
        instead(quantize, "read_calibration", lambda path: "a text of some length " * 50),
        test_cli_quantize.test_a_calibration_file_without_text,
    ),
    "padding that is read": (padding_is_read, test_documents.test_padding_is_in_no_moment),
    "a model without its card": (
        instead(test_demo_model, "FOLDER", test_demo_model.FOLDER.parent),
        test_demo_model.test_the_folder_fits_in_four_million_bytes_and_has_its_card,
    ),
    "prompts of other products": (products_too_large, test_native_prefill.test_a_prompt_is_as_exact_as_stocks),
    "reuse of what has no tokens": (every_call_reuses, test_prefix_calls.test_what_excludes_reuse_is_refused),
    "prefixes that nobody checks": (
        instead(format, "_checksum", lambda data, at: data[at : at + len(format._BLANK)]),
        test_prefix_files.test_every_altered_byte_and_every_truncation_is_a_miss,
    ),
    "what was read ahead is kept": (
        instead(Staging, "forget", nothing),
        test_tiers_prefetch.test_what_was_read_ahead_is_never_stale,
    ),
    "a run that is taken up without its weights": (
        instead(trainer, "load_trained", nothing),
        test_uptrain.test_an_interrupted_run_ends_with_the_same_bits,
    ),
    "a folder that has a model": (
        instead(uptrain_command, "_check_out", nothing),
        test_cli_uptrain.test_a_run_is_interrupted_taken_up_and_written,
    ),
    "measured on what was fitted to": (
        instead(CalibrationText, "split", lambda text, batch=1: (text, text)),
        test_cli_convert_gqa.test_a_checkpoint_that_transformers_loads_and_what_it_cost,
    ),
    "values that nobody tries": (
        instead(maps, "_with_other_values", lambda heads: heads),
        test_gqa_errors.test_values_that_are_changed_on_their_way,
    ),
    "one text in two parts": (
        instead(CalibrationText, "split", lambda text, batch=1: (text, text)),
        test_gqa_texts.test_some_is_fitted_to_and_the_rest_is_other_text,
    ),
    "the worst token": (the_least_likely_token, test_trained_models.test_same_text_in_single_precision),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    tokenizer = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
    with monkeypatch.context() as patch:
        defect(patch)
        fixtures = {"monkeypatch": patch, "tokenizer": tokenizer}
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), **fixtures)
