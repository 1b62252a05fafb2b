"""Results of kernels that are a little off turn the tests of kernels red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_includes
import test_layout
import test_native_attend
import test_native_block
import test_native_block_cached
import test_native_block_stock
import test_native_experts
import test_native_fp4
import test_native_linear
import test_native_packed
import test_native_packed_rows
import test_native_ragged
import test_native_route
import test_vendor
import torch
from planting import Defect, Patch, instead, is_red, result

from hf_accel.kernels import native, vendor, weights
from hf_accel.kernels.native import NativeBlock, NativeExperts
from hf_accel.ops import fp4
from hf_accel.ops.attention import AttentionState

BOOK = [12.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0]


def layer(change: Callable[[Any], Any]) -> Defect:
    return result(NativeBlock, "__call__", change)


def wrong_at(bits: int) -> Defect:
    """Products with weights of so many bits are a little too large."""

    def plant(patch: Patch) -> None:
        right = test_native_packed.packed_linear

        def wrong(x: Any, weight: Any, bias: Any = None) -> Any:
            y = right(x, weight, bias)
            return y * 1.01 if weight.scheme.bits == bits else y

        patch.setattr(test_native_packed, "packed_linear", wrong)

    return plant


def a_circle(patch: Patch) -> None:
    included = test_includes.included_by
    added = {"drivers/attend.h": ["drivers/block.h"], "drivers/block.h": ["drivers/attend.h"]}
    patch.setattr(
        test_includes, "included_by", lambda path: included(path) + added.get(test_includes.name_of(path), [])
    )


PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "a circle of headers": (a_circle, test_includes.test_no_file_includes_itself_by_way_of_others),
    "experts": (
        result(NativeExperts, "__call__", lambda y: y * 1.02),
        test_native_experts.test_experts_equal_their_twin,
    ),
    "routers": (
        result(test_native_route, "route", lambda found: found and (found[0], found[1] * 1.01, found[2])),
        test_native_route.test_routers_equal_their_twin,
    ),
    "products": (result(native, "linear", lambda y: y * 1.01), test_native_linear.test_no_less_exact_than_aten),
    "layers": (layer(lambda y: y * 1.02), test_native_block.test_equals_the_textbook_layer),
    "layers of transformers": (
        layer(lambda y: y * 1.02),
        test_native_block_stock.test_equals_the_layer_of_transformers,
    ),
    "layers over codes": (layer(lambda y: y * 1.5), test_native_block_cached.test_equals_the_layer_over_the_same_rows),
    "rows that see one another": (
        layer(lambda y: y + y.mean(0, keepdim=True)),
        test_native_ragged.test_every_row_is_bit_equal_to_that_row_alone,
    ),
    "a layout that there is not": (
        instead(vendor, "int4_product", lambda weight: weight),
        test_vendor.test_schemes_that_a_kernel_has_no_layout_for_are_left_alone,
    ),
    "packed products": (
        result(test_native_packed, "packed_linear", lambda y: y * 1.01),
        test_native_packed.test_equals_integer_sums_in_plain_loops,
    ),
    "packed products of many rows": (
        result(test_native_packed_rows, "packed_linear", lambda y: y.add(1.0) if len(y) > 32 else y),
        test_native_packed_rows.test_sums_of_whole_numbers_are_exact,
    ),
    "packed products of many rows of bf16": (
        result(
            test_native_packed_rows,
            "packed_linear",
            lambda y: y * 1.01 if y.dtype == torch.bfloat16 and len(y) > 47 else y,
        ),
        test_native_packed_rows.test_many_rows_of_bf16_are_near_the_exact_product,
    ),
    "packed rows that hide what is not finite": (
        result(test_native_packed_rows, "packed_linear", lambda y: y.nan_to_num()),
        test_native_packed_rows.test_what_is_not_finite_stays_in_its_row,
    ),
    "packed rows that see others": (
        result(test_native_packed_rows, "packed_linear", lambda y: y * (1.0 + len(y) / 64)),
        test_native_packed_rows.test_a_row_among_many_equals_the_row_alone,
    ),
    "packed products of one instruction set": (
        result(test_native_packed_rows, "packed_linear", lambda y: y * (1.0 + (native.status().isa == "avx2"))),
        test_native_packed_rows.test_instruction_sets_agree_to_the_last_bit,
    ),
    "packed products of 3 bits": (wrong_at(3), test_native_packed.test_equals_integer_sums_in_plain_loops),
    "packed products of 2 bits": (wrong_at(2), test_native_packed.test_equals_integer_sums_in_plain_loops),
    "fp4 values of the next pattern": (
        instead(fp4, "VALUES", (*fp4.VALUES[1:], 0)),
        test_native_fp4.test_values_are_those_of_the_formula,
    ),
    "exponents of the next group": (
        result(weights, "_laid_out", lambda values: values.roll(1, 1)),
        test_native_fp4.test_every_byte_lies_where_the_layout_says,
    ),
    "products that saturate": (
        result(test_native_fp4, "packed_linear", lambda y: y.clamp(-1e30, 1e30) * (1 - 1e-4)),
        test_native_fp4.test_extreme_codes_and_exponents_are_exact,
    ),
    "ties to the larger value": (
        instead(
            fp4, "nearest", lambda scaled: torch.tensor(BOOK)[(scaled[..., None] - torch.tensor(BOOK)).abs().argmin(-1)]
        ),
        test_native_fp4.test_quantizing_takes_the_nearest_value_and_ties_to_the_even_pattern,
    ),
    "codes of the other columns": (
        result(test_layout, "interleaved", lambda codes: codes.flip(-1)),
        test_layout.test_every_byte_lies_where_the_layout_says,
    ),
    "attention over codes": (
        result(AttentionState, "result", lambda y: y * 1.1),
        test_native_attend.test_equals_attention_over_what_the_rows_read_as,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
