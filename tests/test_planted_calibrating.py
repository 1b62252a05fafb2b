"""Mistakes in solving and calibrating, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_awq
import test_calibrating
import test_calibrating_resume
import test_cli_methods
import test_drift
import test_gptq
import torch
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.ops import gptq
from hf_accel.quantization import gptq as patching
from hf_accel.quantization.calibrating import powers, refining, scaling, solving
from hf_accel.quantization.calibrating.activations import Activations
from hf_accel.quantization.calibrating.folder import LayerFolder


def errors_that_go_nowhere(patch: Patch) -> None:
    factored = gptq.Factor.of

    def wrong(*arguments: Any) -> gptq.Factor:
        found = factored(*arguments)
        return replace(found, upper=torch.diag(found.upper.diagonal()))

    patch.setattr(gptq.Factor, "of", staticmethod(wrong))


def folded_without_biases(place: Any, scales: Any, found: Any, paths: Any, fold: Any = scaling._fold) -> None:
    bias = place.source._parameters.get("bias")
    fold(place, scales, found, paths)
    if bias is not None:
        place.source._parameters["bias"] = bias


def powers_without_differences(self: Any, scales: Any) -> Any:
    last = {path: sums[-1] for path, sums in self._sums.items()}
    return {path: (total / count).float()[None].expand(8, -1) * 1.2 for path, (total, count) in last.items()}


def candidates_by_squares(inputs: Any, weights: Any, candidates: Any = scaling.candidates) -> Any:
    return candidates(inputs.square(), weights)


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
    "moments of what was read before": (
        instead(scaling.Scaled, "moments", lambda self, moments: moments),
        test_awq.test_it_loses_less_and_everything_comes_back,
    ),
    "biases that are not divided": (
        instead(scaling, "_fold", folded_without_biases),
        test_awq.test_heads_that_are_as_many_are_scaled_too,
    ),
    "exponents of squares": (
        instead(scaling, "candidates", candidates_by_squares),
        test_awq.test_exponents_are_those_of_a_textbook,
    ),
    "powers of all that was read before": (
        instead(powers.Powers, "found", powers_without_differences),
        test_drift.test_powers_are_what_the_parts_of_the_text_give,
    ),
    "places that no bar counts": (
        instead(patching, "most_places", lambda blocks: 0),
        test_cli_methods.test_the_bar_ends_where_it_says,
    ),
    "a finished run begun anew": (
        instead(LayerFolder, "finished", lambda self, layers, names: 0),
        test_calibrating_resume.test_a_run_killed_at_ten_random_points_goes_on_to_the_same_bits,
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
