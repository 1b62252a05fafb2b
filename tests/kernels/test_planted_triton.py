"""Results of kernels for GPUs that are a little off turn their tests red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (extra: test)")

import test_device_block
import test_triton_ahead
import test_triton_attention
import test_triton_products
import test_triton_steps
import test_triton_tuning
from planting import Defect, Patch, instead, is_red, result

from hf_accel.kernels.triton import attention, linear, norm, packed, rotary, tuning
from hf_accel.layers import device_block

PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "dense products": (
        result(linear, "linear", lambda y: y * 1.1),
        test_triton_products.test_dense_products_of_siblings,
    ),
    "gates": (
        result(linear, "gated", lambda y: y * 1.01),
        test_triton_products.test_gates_round_where_eager_code_does,
    ),
    "packed products": (
        result(packed, "linear", lambda y: y * 1.1),
        test_triton_products.test_packed_products_of_siblings,
    ),
    "columns that fill the layout up": (
        result(packed, "linear", lambda y: y + 0.01),
        test_triton_products.test_packed_rows_of_odd_length,
    ),
    "attention": (
        result(attention, "decode_attention", lambda y: y * 1.1),
        test_triton_attention.test_equals_its_twin,
    ),
    "norms": (
        result(norm, "add_norm", lambda found: (found[0], found[1] * 1.001)),
        test_triton_steps.test_norms_round_where_eager_code_does,
    ),
    "queries": (
        result(rotary, "rotary_write", lambda y: y * 1.01),
        test_triton_steps.test_rotary_and_the_rows_that_are_written,
    ),
    "launches that are left out": (
        instead(test_triton_ahead, "compiled", lambda folder: [{"kernel": "linear._one_row", "shared": 0}]),
        test_triton_ahead.test_every_launch_compiles,
    ),
    "findings of other processes": (
        instead(tuning, "_read", lambda path: {}),
        test_triton_tuning.test_the_fastest_is_kept_for_other_processes,
    ),
    "caches that are not static": (
        instead(device_block, "is_static", lambda layer: True),
        test_device_block.test_all_else_goes_to_the_layers_own_forward,
    ),
    "audits of layers": (
        instead(device_block, "layer_bound", lambda block, dtype: 1.0),
        test_device_block.test_a_layer_that_differs_is_not_replaced,
    ),
}


@pytest.mark.triton
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch, tmp_path_factory: pytest.TempPathFactory) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"))
