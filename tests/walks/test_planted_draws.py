"""Mistakes in draws from a large vocabulary turn the comparison with stock red: see `test_planted.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_draws
import torch
from planting import Defect, Patch, result

from hf_accel.kernels import native

FEW = 40
"""Of which several draw a token that top-p leaves out, or a later one."""


def without_top_p(patch: Patch) -> None:
    right = native.choose

    def wrong(logits: Any, ids: Any, starts: Any, rules: Any, state: Any) -> Any:
        return right(logits, ids, starts, replace(rules, top_p=None), state)

    patch.setattr(native, "choose", wrong)


PLANTED: dict[str, Defect] = {
    "no top-p": without_top_p,
    "the next token": result(native, "choose", lambda tokens: None if tokens is None else tokens + 1),
    "choices that are never made": result(native, "choose", lambda tokens: None),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(test_draws, "DRAWS", FEW)
    test_draws.test_draws_of_a_large_vocabulary_are_stocks(torch.bfloat16, 3.0)
    with monkeypatch.context() as patch:
        PLANTED[title](patch)
        with pytest.raises(AssertionError):
            test_draws.test_draws_of_a_large_vocabulary_are_stocks(torch.bfloat16, 3.0)
