"""Mistakes in solving and calibrating, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_calibrating
import test_calibrating_resume
import test_gptq
import torch
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.ops import gptq
from hf_accel.quantization.calibrating import refining, solving
from hf_accel.quantization.calibrating.activations import Activations


def errors_that_go_nowhere(patch: Patch) -> None:
    factored = gptq.Factor.of

    def wrong(*arguments: Any) -> gptq.Factor:
        found = factored(*arguments)
        return replace(found, upper=torch.diag(found.upper.diagonal()))

    patch.setattr(gptq.Factor, "of", staticmethod(wrong))


PLANTED: dict[str, tuple[Defect, Test]] = {
    "errors that go nowhere": (errors_that_go_nowhere, test_gptq.test_codes_are_those_of_the_equations),
    "scales that fit something else": (
        instead(gptq, "_fitted", lambda original, factor, affine: 1.01 * affine.scales.double()),
        test_gptq.test_scales_that_are_refitted_are_those_of_least_squares,
    ),
    "one row read again and again": (
        instead(Activations, "row", lambda self, index: self.values[:1]),
        test_calibrating.test_every_product_gets_the_codes_that_solving_it_alone_gives,
    ),
    "steps uphill": (
        instead(refining, "_VALUES", -0.27),
        test_calibrating.test_refining_brings_layers_closer_and_leaves_the_model,
    ),
    "a folder of any run": (
        instead(solving, "fingerprint", lambda *_: "a run"),
        test_calibrating_resume.test_a_folder_of_another_run_is_refused,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
