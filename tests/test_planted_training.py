"""Mistakes in training in few bits turn its tests red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_qat
import test_qat_training
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel.ops import fake_quantize
from hf_accel.quantization import adapting, deploying
from hf_accel.quantization.modules import fake_linear
from hf_accel.recipes import borrowed
from hf_accel.recipes.qat_callback import QATCallback


def two_formulas(patch: Patch) -> None:
    learned = fake_quantize.learned_scales
    patch.setattr(fake_quantize, "learned_scales", lambda start, logs, dtype: learned(start, logs, torch.float32))


def additions_beside(patch: Patch) -> None:
    made = adapting.lora_class()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        delta = sum(self.get_delta_weight(name) for name in self.active_adapters)
        return self.base_layer(x) + x @ delta.T

    patch.setattr(made, "forward", forward)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "two formulas": (two_formulas, test_qat.test_a_life_from_start_to_restore),
    "clipped weights are moved": (
        instead(fake_quantize, "_outside", lambda values, zeros, scheme: torch.zeros_like(values, dtype=torch.bool)),
        test_qat.test_rounding_and_gradients_are_the_textbooks,
    ),
    "a start that is rounded anew": (
        instead(fake_linear, "inside", lambda weight, start: weight.float().clone()),
        test_qat.test_a_start_of_another_method_is_kept,
    ),
    "weights in 16 bits": (
        instead(fake_linear.FakeQuantizedLinear, "_apply", torch.nn.Module._apply),
        test_qat.test_weights_stay_in_single_precision_when_the_model_is_cast,
    ),
    "nothing is looked at before it is deployed": (
        instead(deploying, "_check", nothing),
        test_qat.test_what_cannot_be_deployed_is_refused_and_left_as_it_is,
    ),
    "nobody watches": (
        instead(QATCallback, "on_step_end", nothing),
        test_qat_training.test_the_callback_stops_what_has_gone_wrong,
    ),
    "additions beside what is rounded": (
        additions_beside,
        test_qat_training.test_lora_under_fake_quantization_is_deployed_as_it_was_trained,
    ),
    "copies of what nobody trains": (
        instead(borrowed, "trains_in_single_precision", lambda model: True),
        test_qat_training.test_the_recipe_trains_towards_the_original,
    ),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
