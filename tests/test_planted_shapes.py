"""Mistakes in named shapes, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_mixture_model
import test_shapes
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel.measure import SHAPES
from hf_accel.measure.subjects import shapes
from hf_accel.ops.affine import Scheme
from hf_accel.quantization import building

TURNED = building._turned


def another_width(patch: Patch) -> None:
    patch.setitem(SHAPES, "qwen3-30b-a3b", SHAPES["qwen3-30b-a3b"] | {"moe_intermediate_size": 1408})


def multipliers_of_the_class(patch: Patch) -> None:
    shape = {name: value for name, value in SHAPES["granite-1b-a400m"].items() if name != "residual_multiplier"}
    patch.setitem(SHAPES, "granite-1b-a400m", shape)


def all_layers(patch: Patch) -> None:
    config = shapes.shape_config
    patch.setattr(building, "shape_config", lambda name, layers=None: config(name))


def buffers_as_they_came(patch: Patch) -> None:
    """Parameters are initialised, buffers hold what lay in the memory."""
    initialised = building._initialised

    def wrong(model: Any, module: Any) -> Any:
        found = initialised(model, module)
        for buffer in module._buffers.values():
            buffer.fill_(3.0)
        return found

    patch.setattr(building, "_initialised", wrong)


def a_product_left_in_full_precision(patch: Patch) -> None:
    targets = building.targets
    patch.setattr(building, "targets", lambda *args: (targets(*args)[0][1:], []))


def without_turning(module: Any, steps: int) -> Any:
    return TURNED(module, 0)


def config_of_its_own(module: Any, steps: int) -> Any:
    turned = TURNED(module, steps)
    for inner in turned.modules():
        if hasattr(inner, "config"):
            inner.config = copy.copy(inner.config)
    return turned


PLANTED: dict[str, tuple[Defect, Test]] = {
    "experts of another width": (another_width, test_shapes.test_a_shape_has_the_weights_of_the_published_model),
    "multipliers forgotten": (multipliers_of_the_class, test_shapes.test_what_the_published_configs_say_beside_sizes),
    "buffers as they came": (
        buffers_as_they_came,
        test_shapes.test_a_packed_shape_is_what_quantizing_the_whole_model_gives,
    ),
    "a product left in full precision": (
        a_product_left_in_full_precision,
        test_shapes.test_a_packed_shape_is_what_quantizing_the_whole_model_gives,
    ),
    "the head stays tied": (
        instead(building, "untie", nothing),
        test_shapes.test_a_packed_shape_is_what_quantizing_the_whole_model_gives,
    ),
    "one memory for all layers": (
        instead(building, "_turned", lambda module, steps: module),
        test_shapes.test_each_layer_lies_in_memory_of_its_own,
    ),
    "a config for each layer": (
        instead(building, "_turned", config_of_its_own),
        test_shapes.test_each_layer_lies_in_memory_of_its_own,
    ),
    "layers all alike": (
        instead(building, "_turned", without_turning),
        test_shapes.test_each_layer_lies_in_memory_of_its_own,
    ),
    "each layer in full precision": (
        instead(building, "_kind", lambda target, config: target.path),
        test_shapes.test_full_precision_is_made_of_one_layer_only,
    ),
    "a token ends the text": (
        instead(building, "without_end", lambda model: model),
        test_shapes.test_a_packed_shape_generates_as_it_is_and_optimised,
    ),
    "layers that are not counted": (all_layers, test_shapes.test_a_shape_may_have_fewer_layers),
    "no experts are looked for": (
        instead(building, "holds_experts", lambda module: False),
        test_shapes.test_experts_that_would_stay_in_full_precision_are_refused,
    ),
    "whole numbers for MXFP4": (
        instead(building, "SCHEME", Scheme(4, 32)),
        test_shapes.test_experts_in_mxfp4_beside_all_else_as_it_is,
    ),
    "a tied head apart": (
        instead(building.PreTrainedModel, "tie_weights", nothing),
        test_shapes.test_experts_in_mxfp4_beside_all_else_as_it_is,
    ),
    "a trained mixture without its card": (
        instead(test_mixture_model, "MIXTURE", test_mixture_model.MIXTURE.parent),
        test_mixture_model.test_the_weights_of_all_trained_models_take_five_million_bytes_at_most_and_have_cards,
    ),
    "bench builds all layers": (all_layers, test_shapes.test_bench_builds_a_packed_shape),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        for name, shape in test_shapes.TINY.items():
            patch.setitem(SHAPES, name, shape)
        defect(patch)
        assert is_red(test, monkeypatch=patch)
