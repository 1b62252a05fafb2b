"""Prompts through native layers that are a little off turn their tests red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_native_block_prompts
from planting import Defect, Patch, is_red

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock


def of_many(change: Callable[..., Any]) -> Defect:
    """Calls of more rows than a decoding step has return what `change` makes of the result and the call's arguments."""

    def plant(patch: Patch) -> None:
        right = NativeBlock.__call__

        def wrong(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            found = right(self, hidden, *args, **kwargs)
            is_many = hidden.shape[0] * hidden.shape[1] > native.MAX_ROWS
            return change(self, found, hidden, *args, **kwargs) if is_many else found

        patch.setattr(NativeBlock, "__call__", wrong)

    return plant


def a_stale_key(self: Any, found: Any, hidden: Any, cos: Any, sin: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """The last key of a prompt is not written."""
    keys[:, :, hidden.shape[1] - 1] = 0
    return found


def without_passes(self: Any, found: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The second pass is computed as the first."""
    if found is not None and hidden.shape[0] == 1 and hidden.shape[1] > 128:
        found[:, 128:] = found[:, : hidden.shape[1] - 128]
    return found


def always_a_result(self: Any, found: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden if found is None else found


PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "a key that is not written": (
        of_many(a_stale_key),
        test_native_block_prompts.test_equals_the_layer_of_transformers,
    ),
    "one pass for all": (of_many(without_passes), test_native_block_prompts.test_equals_calls_of_a_few_rows),
    "sequences that see one another": (
        of_many(lambda self, found, *args, **kwargs: found + 0.01 * found.mean(0, keepdim=True)),
        test_native_block_prompts.test_many_rows_of_many_sequences,
    ),
    "a mask that is not looked at": (
        of_many(always_a_result),
        test_native_block_prompts.test_a_mask_that_looks_ahead_has_its_way_or_there_is_no_result,
    ),
    "a result of what cannot be": (
        of_many(always_a_result),
        test_native_block_prompts.test_what_only_few_rows_can_do_has_no_result_of_many,
    ),
    "scores that are not looked at": (
        of_many(always_a_result),
        test_native_block_prompts.test_scores_that_are_not_finite_give_no_result,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
