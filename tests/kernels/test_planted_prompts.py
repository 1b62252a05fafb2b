"""Attention of prompts that is a little off turns its tests red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_native_prompt
import torch
from planting import Defect, Patch, instead, is_red

from hf_accel.kernels import native
from hf_accel.kernels.native import prompt
from hf_accel.ops.attention import AttentionState

_run, _state = prompt._run, prompt.prompt_state
WINDOW, STARTS, SINKS, MASK = 10, 11, 13, 12  # places in the arguments


def other(place: int, change: Callable[[Any], Any]) -> Defect:
    """The kernel is asked for something a little different."""

    def wrong(*arguments: Any) -> None:
        _run(*(change(x) if i == place and x is not None else x for i, x in enumerate(arguments)))

    return instead(prompt, "_run", wrong)


def output(change: Callable[[torch.Tensor], torch.Tensor]) -> Defect:
    """What the kernel gives is changed."""

    def wrong(*arguments: Any) -> None:
        _run(*arguments)
        arguments[4].copy_(change(arguments[4]))

    return instead(prompt, "_run", wrong)


def unweighted(*arguments: Any, **options: Any) -> AttentionState:
    """Parts count alike, whatever their scores."""
    state = _state(*arguments, **options)
    return AttentionState(state.values, torch.where(state.top == -torch.inf, state.top, 0.0), state.sum)


def by_count(change: Callable[[int], float]) -> Defect:
    """Results depend on the number of threads."""

    def wrong(*arguments: Any) -> None:
        _run(*arguments)
        arguments[4].mul_(change(torch.get_num_threads()))

    return instead(prompt, "_run", wrong)


PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "values": (output(lambda y: y * 1.02), test_native_prompt.test_equals_attention_in_fp64),
    "windows that are one too wide": (
        other(WINDOW, lambda n: n + 1),
        test_native_prompt.test_equals_attention_in_fp64,
    ),
    "padding that is seen": (other(STARTS, lambda x: x * 0), test_native_prompt.test_equals_attention_in_fp64),
    "sinks that are left out": (
        other(SINKS, lambda x: x - 50.0),
        test_native_prompt.test_equals_attention_in_fp64,
    ),
    "masks of the next query": (
        other(MASK, lambda x: x.roll(1, -2)),
        test_native_prompt.test_a_mask_in_another_form_gives_the_same,
    ),
    "values of codes": (
        output(lambda y: y * 1.05),
        test_native_prompt.test_equals_attention_over_what_the_rows_read_as,
    ),
    "stretches": (output(lambda y: y.roll(1, 1)), test_native_prompt.test_where_stretches_and_spans_end),
    "threads": (by_count(lambda n: 1.0 + n / 64), test_native_prompt.test_any_number_of_threads_and_strides),
    "neighbours": (
        output(lambda y: y * (1.0 + y.shape[1] / 1024)),
        test_native_prompt.test_a_query_comes_out_as_it_does_alone,
    ),
    "nan": (output(torch.nan_to_num), test_native_prompt.test_nan_stays_visible_to_those_who_see_it),
    "parts": (instead(native, "prompt_state", unweighted), test_native_prompt.test_parts_merge_into_the_whole),
    "sizes": (instead(prompt, "_check", lambda *_: None), test_native_prompt.test_heads_that_are_too_large_are_refused),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
