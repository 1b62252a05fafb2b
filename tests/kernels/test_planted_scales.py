"""Mistakes with scales of fp16 and with offsets turn tests red: a further table, see `test_planted_kernels.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_half_scales
import torch
from planting import Defect, Patch, instead, is_red

from hf_accel.kernels import native, weights
from hf_accel.kernels.weights import PackedWeight


def taken_for_bfloat16(patch: Patch) -> None:
    patch.setitem(weights._SCALES, torch.uint16, weights._SCALES[torch.int16])


def rounded_to_codes(patch: Patch) -> None:
    """Offsets are taken for those of whole zeros, whatever they are."""

    def zeros(self: Any, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return (-offsets / scales).round().clamp(-8, 7).to(torch.int8)

    patch.setattr(PackedWeight, "_whole_zeros", zeros)


PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "taken for bfloat16": (taken_for_bfloat16, test_half_scales.test_products_are_those_of_wide_scales),
    "offsets rounded": (rounded_to_codes, test_half_scales.test_offsets_that_are_no_multiples_of_scales_are_added),
    "offsets left out": (
        instead(weights, "_offsets", lambda part: torch.zeros_like(part.scales)),
        test_half_scales.test_offsets_that_are_no_multiples_of_scales_are_added,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, isa=native.status().isa)
