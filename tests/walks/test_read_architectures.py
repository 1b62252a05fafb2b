"""A model of any architecture that is read in few bits is, bit for bit, the one that is quantized in memory.

Through `hf_accel.load`, from its pack, and through transformers' own loading. What cannot be built small, or cannot be
quantized, is skipped with the reason.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CannotBuild, architectures, tiny
from transformers import AutoConfig

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.errors import UnsupportedModelError

# experts that are transposed and have biases, a recurrence, a product tied with its bias, buffers of one layer that
# another computes
FEW = ["gpt_oss", "mamba", "bert", "falcon_h1"]
FOUR = WeightOnlyConfig(bits=4, group_size=32)


def compare(one: Any, other: Any) -> None:
    """Compare all that two models hold."""
    assert type(one).__name__ == type(other).__name__
    assert one.config.to_dict() == other.config.to_dict()
    named = [dict([*model.named_parameters(), *model.named_buffers()]) for model in (one, other)]
    assert named[0].keys() == named[1].keys()
    for name, tensor in named[0].items():
        twin = named[1][name]
        assert not tensor.is_meta, name
        assert tensor.dtype == twin.dtype, name
        assert torch.equal(tensor.nan_to_num(), twin.nan_to_num()), name
        assert tensor.requires_grad == twin.requires_grad, name


def check(model_type: str, folder: Path) -> None:
    try:
        original = tiny(model_type)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    original.save_pretrained(folder / "model", max_shard_size="100KB")
    cls = type(original)
    config = AutoConfig.from_pretrained(folder / "model")  # some types are another's class
    try:
        whole, told = cls.from_pretrained(folder / "model", config=config, output_loading_info=True)
    except RuntimeError as reason:
        pytest.skip(f"transformers does not load what it has saved: {reason}")
    if told["missing_keys"] or told["unexpected_keys"]:
        pytest.skip(f"transformers does not load all that it has saved: {told}")
    try:
        hf_accel.optimize(whole, FOUR, originals="drop")
    except UnsupportedModelError as reason:
        pytest.skip(str(reason))
    compare(hf_accel.load(folder / "model", FOUR, cache=True), whole)
    compare(hf_accel.load(folder / "model", FOUR, cache=True), whole)
    compare(cls.from_pretrained(folder / "model", config=config, quantization_config=FOUR), whole)


@pytest.mark.parametrize("model_type", FEW)
def test_some_architectures_are_read_in_few_bits(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in architectures() if name not in FEW])
def test_every_architecture_is_read_in_few_bits(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)
    logging.getLogger("architectures").info("%s is read", model_type)
