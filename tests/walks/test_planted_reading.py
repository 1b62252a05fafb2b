"""Mistakes in reading models of any architecture in few bits: see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_read_architectures
import torch
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.quantization.reading import mapped, quantizer


def without_what_models_compute(patch: Patch) -> None:
    """Leave out of packs what no checkpoint holds, as buffers that are computed when a model is built."""
    before = mapped._tensors

    def after(model: Any) -> dict[str, torch.Tensor]:
        kept = model.state_dict()
        return {name: tensor for name, tensor in before(model).items() if name in kept}

    patch.setattr(mapped, "_tensors", after)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "buffers that are not kept": (
        without_what_models_compute,
        test_read_architectures.test_some_architectures_are_read_in_few_bits,
    ),
    "biases of experts as they lie": (
        instead(quantizer, "gate_first", lambda rows, layout, name: rows),
        test_read_architectures.test_some_architectures_are_read_in_few_bits,
    ),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, monkeypatch=patch, tmp_path=lambda: tmp_path_factory.mktemp("planted"))
