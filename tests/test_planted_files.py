"""Mistakes in reading and writing the files of other programs: the third table, see `test_planted.py`.

Most of them are made alike in reading and writing, so that what we wrote comes back and only the twins of the packers
see them.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_bitstream
import test_gptq_damage
import test_gptq_files
import test_gptq_saving
import torch
from planting import Defect, Patch, Test, instead, is_red, result
from torch import Tensor

from hf_accel.quantization.files import awq, bitstream, encoding, foreign, gptq, pack_quantized, zeros
from hf_accel.quantization.files.layout import Stored


def highest_bits_first(patch: Patch) -> None:
    pack, unpack = bitstream.pack, bitstream.unpack
    patch.setattr(bitstream, "pack", lambda codes, bits: pack(codes, bits).flip(-1))
    patch.setattr(bitstream, "unpack", lambda words, bits, count: unpack(words.flip(-1), bits, count))


def field_by_field(words: Tensor, bits: int, count: int) -> Tensor:
    return bitstream.unpack(words, bits, count) + 1 & (1 << bits) - 1


def without_order(patch: Patch) -> None:
    patch.setattr(gptq, "Stored", lambda weight, order: Stored(weight, None))


PLANTED: dict[str, tuple[Defect, Test]] = {
    "the highest word first": (highest_bits_first, test_bitstream.test_three_bits_are_the_pattern_of_gptq),
    "zeros undone field by field": (
        instead(zeros, "undone", field_by_field),
        test_gptq_files.test_bits_and_versions,
    ),
    "columns that are not gathered": (without_order, test_gptq_files.test_columns_in_the_order_of_activations),
    "nibbles in their order": (instead(awq, "_NIBBLES", tuple(range(8))), test_gptq_files.test_awq),
    "scales without a sign": (
        result(gptq, "grouped", lambda found: (found[0].scales.abs_(), found)[1]),
        test_gptq_files.test_scales_of_every_dtype_are_kept,
    ),
    "zeros that nobody looks at": (
        result(zeros, "_is_destroyed", lambda found: False),
        test_gptq_damage.test_zeros_that_their_packer_destroyed,
    ),
    "labels that are not known": (
        instead(foreign, "GPTQ_LABELS", dict.fromkeys(("gptq", "gptq_v2", "gptq_p", "marlin", "bitblas", 7), 2)),
        test_gptq_damage.test_unknown_labels_are_refused_by_name,
    ),
    "an index that nobody checks": (
        instead(gptq, "check_index", lambda *given: None),
        test_gptq_damage.test_wrong_tensors_are_named_with_their_file,
    ),
    "every width is the dense one": (
        instead(pack_quantized, "_is_sparse", lambda *given: False),
        test_gptq_damage.test_three_bits_whose_layout_cannot_be_told,
    ),
    "scales in half precision": (
        instead(encoding, "_holds", lambda dtype, bits: dtype is torch.float16),
        test_gptq_saving.test_scales_are_of_the_smallest_dtype_that_holds_them,
    ),
    "zeros of the other version": (
        instead(encoding, "GPTQ_LABELS", {"gptq": 2, "gptq_v2": 1}),
        test_gptq_saving.test_files_are_those_of_the_twin_and_come_back,
    ),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, monkeypatch=patch, tmp_path=lambda: tmp_path_factory.mktemp("planted"))
