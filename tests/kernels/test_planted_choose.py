"""Mistakes in sampling by selection, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import test_native_choose
import test_selecting
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.decoding import selecting
from hf_accel.kernels import native
from hf_accel.kernels.native import Rules


def one_row_after_the_other(patch: Patch) -> None:
    """Each row makes the draws of the first."""
    right = native.choose

    def wrong(logits: Any, ids: Any, starts: Any, rules: Any, state: Any) -> Any:
        tokens = right(logits, ids, starts, rules, None if state is None else state)
        if tokens is not None and state is not None and len(tokens) > 1:
            tokens[1:] = tokens[0]
        return tokens

    patch.setattr(native, "choose", wrong)


def without(rule: str) -> Defect:
    """One of the rules is forgotten."""

    def plant(patch: Patch) -> None:
        right = selecting.rules_of

        def wrong(processors: Any) -> Any:
            found = right(processors)
            return found and Rules(**{**vars(found), rule: None})

        patch.setattr(selecting, "rules_of", wrong)

    return plant


def subclasses_too(patch: Patch) -> None:
    right = selecting.rules_of
    patch.setattr(selecting, "rules_of", lambda processors: right([stock_part(one) for one in processors]))


def stock_part(processor: Any) -> Any:
    """Return a subclass's processor as one of the class in transformers."""
    kind = next((kind for kind in selecting._SERVED if isinstance(processor, kind)), type(processor))
    found = kind.__new__(kind)
    vars(found).update(vars(processor))
    return found


DRAWS = test_selecting.test_ten_thousand_draws_are_stocks
PLANTED: dict[str, tuple[Defect, Test]] = {
    "a generator that stays where it was": (
        instead(selecting, "set_random_state", nothing),
        test_selecting.test_texts_are_stocks,
    ),
    "no temperature": (without("temperature"), DRAWS),
    "no top-k": (without("top_k"), DRAWS),
    "no top-p": (without("top_p"), DRAWS),
    "no penalty": (without("penalty"), test_selecting.test_where_the_penalty_begins),
    "classes that do something else": (
        subclasses_too,
        test_selecting.test_processors_that_do_something_else_are_asked,
    ),
    "a penalty for padding": (
        instead(selecting, "_starts", lambda ignored, rows: [0] * rows),
        test_selecting.test_where_the_penalty_begins,
    ),
    "draws that nobody compared": (
        instead(selecting, "_draws_are_known", functools.lru_cache(lambda *_: True)),
        test_selecting.test_a_torch_that_draws_otherwise_draws_for_itself,
    ),
    "two texts that draw at once": (
        instead(selecting, "_turn", contextlib.nullcontext()),
        test_selecting.test_threads_do_not_make_the_same_draws,
    ),
    "a choice that rounding decides": (
        result(native, "choose", lambda tokens: torch.zeros(1, dtype=torch.int64) if tokens is None else tokens),
        test_selecting.test_equal_scores_where_top_p_ends_are_sorted_by_stock,
    ),
    "choices that are never made": (
        instead(native, "choose", nothing),
        test_native_choose.test_tokens_are_stocks,
    ),
    "rows that draw alike": (one_row_after_the_other, test_native_choose.test_tokens_are_stocks),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
