"""Mistakes planted in setting up turn the tests of models in use, hooked or failing red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_attention
import test_in_use
import test_planner
import test_wrappers

from hf_accel.attention.names import BackEndName
from hf_accel.cache.prefix import reuse
from hf_accel.core.calls.doors import MAKERS, Door
from hf_accel.core.model import anatomy, shadow
from hf_accel.core.model import hf_config as configs
from hf_accel.core.steps import applying
from hf_accel.decoding import speculating
from hf_accel.errors import UnsupportedModelError
from hf_accel.layers import audit
from hf_accel.planner import goals, timing, trying
from hf_accel.speculative import forms as copies

Patch = pytest.MonkeyPatch


def plans_on_the_model_itself(patch: Patch) -> None:
    for module in (goals, audit, copies):
        patch.setattr(module, "twin", lambda model: model)


def drafting_copies_keep_hooks(patch: Patch) -> None:
    patch.setattr(shadow, "_is_of_library", lambda hook: True)


def one_odd_layer_switches_off_all(patch: Patch) -> None:
    find = anatomy.described_blocks

    def wrong(model: Any, known: Any = None) -> Any:
        found, odd, missing = find(model, known)
        return ([], (), odd[0]) if odd else (found, odd, missing)

    patch.setattr(anatomy, "described_blocks", wrong)


def errors_of_steps_escape(patch: Patch) -> None:
    patch.setattr(applying, "_patched", lambda patcher, setting, host: patcher.patch(setting, host))


def text_is_not_compared(patch: Patch) -> None:
    patch.setattr(trying, "_fault", lambda *_: None)


def losses_within_what_times_vary_by(patch: Patch) -> None:
    patch.setattr(timing, "spread", lambda seconds: 0.0)


def keywords_without_a_loop(patch: Patch) -> None:
    patch.delitem(MAKERS, Door.TOKEN_LOOP)


def virtual_tokens_unseen(patch: Patch) -> None:
    patch.setattr(reuse, "foreign_inputs", lambda model: None)


def virtual_tokens_unnamed(patch: Patch) -> None:
    patch.setattr(speculating, "foreign_inputs", lambda model: None)


def attention_that_models_do_not_know(patch: Patch) -> None:
    patch.setattr(BackEndName, "__eq__", str.__eq__)


def attention_taken_back(patch: Patch) -> None:
    patch.setattr(configs, "_carry_over", lambda *_: None)


DEFECTS: dict[Callable[[Patch], None], Callable[[Patch], None]] = {
    plans_on_the_model_itself: lambda patch: test_in_use.test_planning_fires_no_hook_of_the_users(),
    drafting_copies_keep_hooks: lambda patch: test_in_use.test_drafts_fire_no_hook_of_the_users("layer_skip"),
    one_odd_layer_switches_off_all: test_in_use.test_a_layer_that_is_not_as_described_costs_only_itself,
    errors_of_steps_escape: lambda patch: test_in_use.test_foreign_errors_of_a_step(
        test_in_use.KVCacheConfig, "patch", patch
    ),
    text_is_not_compared: test_in_use.test_a_step_that_writes_other_logits_is_left_out,
    losses_within_what_times_vary_by: lambda patch: test_planner.test_a_loss_is_shown_beyond_what_times_vary_by(),
    keywords_without_a_loop: lambda patch: test_in_use.test_keywords_are_understood_whatever_was_found_to_pay(
        [test_in_use.DecodingConfig]
    ),
    virtual_tokens_unseen: lambda patch: test_wrappers.test_virtual_tokens_of_peft_are_honoured_and_named(
        "PromptTuningConfig"
    ),
    virtual_tokens_unnamed: lambda patch: test_wrappers.test_virtual_tokens_of_peft_are_honoured_and_named(
        "PromptTuningConfig"
    ),
    attention_that_models_do_not_know: lambda patch: test_attention.test_models_that_ask_for_its_name_find_sdpa(),
    attention_taken_back: lambda patch: test_attention.test_an_attention_chosen_later_outlives_restore(),
}


@pytest.mark.native
@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_is_seen(defect: Callable[[Patch], None], monkeypatch: Patch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.05)
    with monkeypatch.context() as patch:
        defect(patch)
        with pytest.raises((AssertionError, UnsupportedModelError, test_in_use.Foreign)):
            DEFECTS[defect](patch)
