"""Mistakes in captured steps, their buffers and late flags turn their tests red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_after_compiling
import test_compilation
import test_compiled_blocks
import test_followed_steps
import test_lag
import test_static_attention
import test_static_step
import torch
from planting import Defect, Patch, instead, is_red, nothing, result

from hf_accel.compilation import caches, runner, slots, step, trial
from hf_accel.compilation.blocks import CompiledSteps
from hf_accel.compilation.call_layers import CallLayer
from hf_accel.compilation.guard import ModelGuard
from hf_accel.compilation.slots import Slot
from hf_accel.compilation.step_layers import Fill
from hf_accel.core.model import watching
from hf_accel.decoding import arrival, steps
from hf_accel.decoding.writing import Writing
from hf_accel.ops import cached, static_attention


def without_starts(patch: Patch) -> None:
    right = static_attention.visible_columns
    patch.setattr(static_attention, "visible_columns", lambda lengths, starts, *rest: right(lengths, starts * 0, *rest))


def filler_counts(patch: Patch) -> None:
    """Steps that were filled up count their filler as tokens."""
    right = CallLayer.advance
    patch.setattr(CallLayer, "advance", lambda layer, tokens: right(layer, tokens if tokens == 1 else tokens + 1))


def wrong_column(patch: Patch) -> None:
    right = Fill.begin
    patch.setattr(Fill, "begin", lambda fill, ahead: right(fill, ahead + 1))


def late(patch: Patch) -> None:
    """What the table's tests need around them, which pytest does by fixtures."""
    patch.setattr(arrival, "ASYNCHRONOUS", frozenset({"cpu"}))
    patch.setattr(runner, "PAYS_BACK", 0)
    test_compilation.shared.cache_clear()


def without_positions(self: step.StaticStep) -> step.StepResults:
    results = self.run()
    self.slot.fill.lengths.add_(self.tokens)
    if self.tokens == 1:
        self.ids.copy_(results.choices)
    return results


PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "padding is seen": (without_starts, test_static_attention.test_equals_the_textbook_row_by_row),
    "what a compiler writes is a change": (
        instead(watching, "BOOKKEEPING", {"__doc__"}),
        test_after_compiling.test_layers_run_natively_after_something_else_was_compiled,
    ),
    "every token goes through the host": (
        instead(runner.StaticRunner, "follow", lambda self, cache: None),
        test_followed_steps.test_a_token_costs_the_host_few_operations,
    ),
    "positions stay where they were": (
        instead(step.StaticStep, "run_and_advance", without_positions),
        test_followed_steps.test_the_text_is_stocks,
    ),
    "what compiled code reads is a change": (
        instead(watching, "_is_bookkeeping", lambda name: name in watching.BOOKKEEPING),
        test_after_compiling.test_globals_of_compiled_code_are_no_change,
    ),
    "codes are read as other codes": (
        result(cached, "decode", lambda x: x * 1.5),
        test_static_attention.test_codes_are_read_as_what_they_stand_for,
    ),
    "columns one too far": (
        result(static_attention, "visible_columns", lambda mask: mask | mask.roll(1, -1)),
        test_static_attention.test_columns_beyond_a_row_do_not_matter,
    ),
    "a step writes one column off": (wrong_column, test_compilation.test_plain_steps_are_all_replayed),
    "filler counts": (filler_counts, test_compilation.test_verification_is_replayed),
    "buffers are taken from who kept them": (
        instead(Slot, "evict", nothing),
        test_compilation.test_a_cache_that_was_returned_stays_as_it_was,
    ),
    "two owners": (
        instead(Slot, "is_in_use", lambda slot: False),
        test_static_step.test_a_slot_has_one_owner,
    ),
    "slots without end": (instead(slots, "MOST", 100), test_static_step.test_slots_are_not_kept_without_end),
    "a capture per length": (
        instead(test_static_step, "capacity_for", lambda tokens: tokens + 16),
        test_static_step.test_fifty_prompt_lengths_are_few_captures,
    ),
    "the model may change": (
        instead(ModelGuard, "_change_obstacle", nothing),
        test_compilation.test_other_weights_are_captured_anew,
    ),
    "hooks are not seen": (
        instead(ModelGuard, "obstacle", nothing),
        test_compilation.test_what_captures_cannot_see_leaves_steps_eager,
    ),
    "holes are not seen": (
        instead(caches, "starts_of", lambda mask, rows: (None, None)),
        test_compilation.test_a_mask_with_holes_is_left_to_stock,
    ),
    "logits are not compared": (
        instead(trial, "_is_close", lambda *_: True),
        test_static_step.test_a_step_that_gives_other_logits_is_refused,
    ),
    "nothing is traced": (
        instead(trial, "trace_obstacle", nothing),
        test_static_step.test_what_cannot_be_captured_is_refused_with_a_reason,
    ),
    "captures at once": (
        lambda patch: patch.setattr(Slot, "expected", property(lambda slot: 10**6, nothing), raising=False),
        test_compilation.test_captures_wait_until_they_pay_back,
    ),
    "the surplus stays": (
        instead(Writing, "take_back", lambda writing: 0),
        test_lag.test_a_text_that_ends_takes_one_pass_more,
    ),
    "draws of the surplus stay": (
        instead(steps, "set_random_state", nothing),
        test_lag.test_a_text_that_ends_takes_one_pass_more,
    ),
    "late for everybody": (
        instead(arrival, "processor_obstacle", nothing),
        test_lag.test_code_of_the_users_is_not_called_too_often,
    ),
    "old copies are compiled": (
        instead(CompiledSteps, "forget", nothing),
        test_compiled_blocks.test_other_weights_are_compiled_again,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_mistake_is_seen(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    defect, test = PLANTED[name]
    with pytest.MonkeyPatch.context() as patch:
        late(patch)
        patch.setattr(test_compiled_blocks.patcher, "step_seconds", lambda *_: (2.0, 1.0))
        patch.setattr(test_compiled_blocks.blocks, "BACK_END", "eager")
        torch._dynamo.reset()
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"))
