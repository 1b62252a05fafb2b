"""Mistakes that change which layers run natively, or what they write, turn the walk over architectures red."""

from __future__ import annotations

import pytest
import test_native_layers
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.core.model.discovery.forms import CallForm
from hf_accel.kernels.native import NativeBlock
from hf_accel.layers.step_guard import StepGuard


def native_layers_that_lose_their_masks(patch: Patch) -> None:
    call = NativeBlock.__call__

    def wrong(self, hidden, cos, sin, keys, values, past, first=0, mask=None, *rest):  # type: ignore[no-untyped-def]
        return call(self, hidden, cos, sin, keys, values, past, first, None if hidden.shape[1] == 1 else mask, *rest)

    patch.setattr(NativeBlock, "__call__", wrong)


def no_call_is_served(patch: Patch) -> None:
    """Neither those of layers, nor steps of the whole model."""
    patch.setattr(CallForm, "fits", lambda self, arguments: False)
    patch.setattr(StepGuard, "step_for", lambda self, request: None)


def one(model_type: str) -> Test:
    return lambda: test_native_layers.test_some_architectures_are_as_the_page_says(model_type)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "no call is served": (no_call_is_served, one("olmo2")),
    "steps without masks": (native_layers_that_lose_their_masks, one("cohere")),
    "a page that was shortened": (
        instead(test_native_layers, "rows", lambda page: {}),
        test_native_layers.test_the_page_is_what_its_rows_make,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test)
