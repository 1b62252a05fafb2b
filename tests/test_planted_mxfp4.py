"""Mistakes in reading and writing MXFP4 turn its tests red: a further table, see `test_planted.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_mxfp4_files
import test_mxfp4_products
import torch
from planting import Defect, Patch, Test, instead, is_red, result
from torch import Tensor

from hf_accel.kernels import weights
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import fp4
from hf_accel.quantization import patcher
from hf_accel.quantization.files import formats, inventory, mxfp4, mxfp4_encoding
from hf_accel.quantization.modules.experts import QuantizedExperts


def both_ways(change: Callable[[Tensor], Tensor]) -> Defect:
    """Bytes of files are changed alike in reading and writing, so that what we wrote comes back."""

    def plant(patch: Patch) -> None:
        read, write = weights.from_mxfp4, weights.to_mxfp4
        patch.setattr(weights, "from_mxfp4", lambda blocks: read(change(blocks)))
        patch.setattr(weights, "to_mxfp4", lambda codes: change(write(codes)))

    return plant


def without_signs_of_zeros(patch: Patch) -> None:
    right = PackedWeight.from_mxfp4
    patch.setattr(
        PackedWeight, "from_mxfp4", staticmethod(lambda *tensors: PackedWeight.pack(right(*tensors).unpack()))
    )


def expanded_on_the_way(patch: Patch) -> None:
    right = PackedWeight.from_mxfp4

    def wasteful(*tensors: Any) -> PackedWeight:
        found = right(*tensors)
        found.unpack()
        return found

    patch.setattr(PackedWeight, "from_mxfp4", staticmethod(wasteful))


def by_turns(patch: Patch) -> None:
    """The gate is handed columns as the packed rows lie."""
    right = QuantizedExperts.__init__

    def built(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        self.is_reordered = False

    patch.setattr(QuantizedExperts, "__init__", built)


def doubled(patch: Patch) -> None:
    right = fp4.scales
    patch.setattr(fp4, "scales", lambda exponents: 2 * right(exponents))


PLANTED: dict[str, tuple[Defect, Test]] = {
    "the high half first": (
        both_ways(lambda blocks: blocks >> 4 | blocks << 4),
        test_mxfp4_products.test_products_are_those_of_the_file,
    ),
    "rows of gate and up by turns": (
        instead(mxfp4, "gate_first", lambda rows, *_: rows),
        test_mxfp4_files.test_every_bit_is_that_of_the_file_and_rows_of_gate_lie_first,
    ),
    "zeros that lose their sign": (
        without_signs_of_zeros,
        test_mxfp4_files.test_every_bit_is_that_of_the_file_and_rows_of_gate_lie_first,
    ),
    "weights expanded on the way": (expanded_on_the_way, test_mxfp4_files.test_nothing_is_expanded),
    "a gate that reads other columns": (
        by_turns,
        test_mxfp4_files.test_without_rounded_activations_it_is_the_stock_model,
    ),
    "scales twice as large": (doubled, test_mxfp4_files.test_without_rounded_activations_it_is_the_stock_model),
    "a limit of NaN that lets it through": (
        instead(fp4, "LARGEST_EXPONENT", 255),
        test_mxfp4_files.test_damaged_checkpoints_are_refused_by_the_name_of_the_tensor,
    ),
    "biases that are not saved": (
        result(inventory, "_plain", lambda found: {n: t for n, t in found.items() if not n.endswith("0.bias")}),
        test_mxfp4_files.test_saved_and_loaded_again_it_is_the_same_to_the_bit,
    ),
    "rows of gate above up in the files": (
        instead(mxfp4_encoding, "_stacked", lambda parts, by_turns: torch.stack(list(parts))),
        test_mxfp4_files.test_saved_in_mxfp4_the_tensors_are_those_that_were_read,
    ),
    "whole numbers in the format of MXFP4": (
        instead(mxfp4_encoding.Mxfp4Encoding, "_misfit", lambda *_: ""),
        test_mxfp4_files.test_what_the_format_cannot_hold_is_refused_with_the_reason,
    ),
    "models that cannot be built upon": (
        instead(patcher, "are_experts_alone", lambda model: False),
        test_mxfp4_files.test_what_is_beside_the_experts_can_be_quantized,
    ),
    "any packed experts built upon": (
        instead(patcher, "are_experts_alone", lambda model: True),
        test_mxfp4_files.test_experts_that_were_packed_here_are_not_built_upon,
    ),
    "another name of the format": (
        instead(mxfp4, "FORMAT", "mxfp4"),
        test_mxfp4_products.test_what_is_saved_comes_back_and_has_the_names_of_the_package,
    ),
    "one format for all groups": (
        instead(formats, "MIXED", formats.FORMAT),
        test_mxfp4_products.test_beside_whole_numbers_each_group_says_its_format,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
