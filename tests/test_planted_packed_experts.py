"""Mistakes in packing experts, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_foreign_experts
import test_mixed_experts
import test_quantized_experts
from planting import Defect, Patch, Test, instead, is_red, nothing, result
from torch import nn

from hf_accel.core.model.experts import ExpertsLayout
from hf_accel.kernels.native import Gate, NativeExperts
from hf_accel.quantization import gptq, patcher, targets
from hf_accel.quantization.allocating import groups, listening, sensitivity
from hf_accel.quantization.calibrating import solving
from hf_accel.quantization.config import ProductsConfig
from hf_accel.quantization.files import experts as filling
from hf_accel.quantization.files import foreign_experts
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.modules import experts, routed

_call = NativeExperts.__call__


def without_biases(names: list[str]) -> list[str]:
    return [name for name in names if not (".experts." in name and name.endswith(".bias"))]


def with_bias_of_the_original(module: Any, layout: Any, name: str, index: int, *given: Any) -> Any:
    product = experts.packed_product(module, layout, name, index, *given)
    bias = experts.bias_of(module, layout, name, index)
    product.bias = None if bias is None else nn.Parameter(experts.gate_first(bias, layout, name), requires_grad=False)
    return product


def of_the_expert_before(module: Any, layout: Any, name: str, index: int) -> Any:
    return experts.weight_of(module, layout, name, index - 1)


def as_they_lie(module: Any, layout: Any, *given: Any) -> Any:
    return experts.packed_product(module, replace(layout, interleaved=False), *given)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "rows by turns": (
        instead(experts, "gate_first", lambda rows, *_: rows),
        test_quantized_experts.test_packed_products_have_gate_above_up,
    ),
    "the weights of the expert before": (
        instead(patcher, "weight_of", of_the_expert_before),
        test_quantized_experts.test_packed_products_have_gate_above_up,
    ),
    "a gate of another kind": (
        instead(routed, "gate_of", lambda *_: Gate("relu")),
        test_quantized_experts.test_one_call_equals_the_stock_module,
    ),
    "the last expert for ids out of range": (
        instead(NativeExperts, "__call__", lambda self, x, ids, w, **o: _call(self, x, ids.clamp(0, 3), w, **o)),
        test_quantized_experts.test_ids_out_of_range_are_no_experts,
    ),
    "addresses that are never looked at again": (
        instead(routed.RoutedCall, "_is_same", lambda *_: True),
        test_quantized_experts.test_what_becomes_of_tensors_is_followed,
    ),
    "hooks that are not called": (
        lambda patch: patch.setattr(routed, "any", lambda hooks: False, raising=False),
        test_quantized_experts.test_what_becomes_of_tensors_is_followed,
    ),
    "looked at in every forward pass": (
        instead(routed, "request_in_progress", nothing),
        test_quantized_experts.test_everything_is_looked_at_once_in_a_call_of_generate,
    ),
    "no gradient": (
        instead(experts, "_is_grad_enabled", lambda: False),
        test_quantized_experts.test_gradients_autocast_and_tracing_run_one_by_one,
    ),
    "rows that nobody counts": (
        instead(experts, "request_in_progress", nothing),
        test_quantized_experts.test_rows_are_counted_in_calls_of_generate,
    ),
    "copies with the addresses of what they are copies of": (
        instead(experts.QuantizedExperts, "__getstate__", lambda self: self.__dict__ | {"counts": None}),
        test_quantized_experts.test_copies_pickles_and_restored_models,
    ),
    "biases on the memory of originals": (
        instead(patcher, "packed_product", with_bias_of_the_original),
        test_quantized_experts.test_dropped_experts_are_freed_and_bytes_are_foretold,
    ),
    "bytes without scales": (
        result(patcher, "packed_bytes", lambda nbytes: nbytes // 2),
        test_quantized_experts.test_dropped_experts_are_freed_and_bytes_are_foretold,
    ),
    "any layout": (
        instead(targets, "_layout", lambda module: ExpertsLayout(4, 48, 72, False, False, False)),
        test_quantized_experts.test_an_unknown_gate_is_the_class_s_own_and_an_unknown_layout_is_said,
    ),
    "down in the place of gate and up": (
        instead(filling, "PRODUCTS", ("down_proj", "gate_up_proj")),
        test_quantized_experts.test_saved_experts_come_back_to_the_bit,
    ),
    "biases that are not read": (
        result(Filler, "_unpacked_names", without_biases),
        test_quantized_experts.test_saved_experts_come_back_to_the_bit,
    ),
    "foreign rows by turns": (
        instead(foreign_experts, "ordered", lambda codes, bias, *_: (codes, bias)),
        test_foreign_experts.test_experts_of_gpt_oss,
    ),
    "tensors of all experts taken for those of one": (
        lambda patch: patch.setattr(foreign_experts._Stacked, "place", property(nothing, nothing), raising=False),
        test_foreign_experts.test_experts_of_gpt_oss,
    ),
    "no class of products": (
        instead(foreign_experts, "_STAND_IN", None),
        test_foreign_experts.test_experts_of_compressed_tensors,
    ),
    "experts without the router's weights": (
        result(listening.Given, "of", lambda found: (found[0], 0 * found[1] + 1)),
        test_mixed_experts.test_the_cost_of_an_expert_is_its_part_in_the_error_of_the_layer,
    ),
    "all tokens for every expert": (
        instead(listening.torch, "where", lambda mask: listening.torch.nonzero(mask + True, as_tuple=True)),
        test_mixed_experts.test_the_cost_of_an_expert_is_its_part_in_the_error_of_the_layer,
    ),
    "costs of other experts": (
        result(
            sensitivity,
            "costs_apart",
            lambda found: [replace(g, options=o.options) for g, o in zip(found, found[::-1])],
        ),
        test_mixed_experts.test_experts_that_cost_more_have_more_bits,
    ),
    "experts that stay as they are among others": (
        instead(groups, "KEPT_BITS", 0),
        test_mixed_experts.test_groups_of_experts_apart_are_parts_of_those_together,
    ),
    "the name of a product before patterns": (
        instead(ProductsConfig, "_patterns", []),
        test_mixed_experts.test_patterns_may_speak_of_an_expert_s_products,
    ),
    "solved of however few tokens": (
        instead(solving.Calibrator, "_factor", lambda self, product, moment: None),
        test_mixed_experts.test_experts_that_read_too_little_are_rounded_and_counted,
    ),
    "solved rows by turns": (
        instead(gptq, "packed_product", as_they_lie),
        test_quantized_experts.test_calibrated_experts_have_gate_above_up,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
