"""A model of any architecture with packed weights comes back from disk, or is refused before anything is written.

Ours: bit for bit, in the class that was saved. Stock transformers: the same function where the published layout was
chosen, and an error where it was not. What cannot be built small is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CannotBuild, architectures, tiny
from models import prompt
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.errors import UnsupportedModelError
from hf_accel.quantization.files.rebuilding import causal_class
from hf_accel.quantization.modules.linear import QuantizedLinear

# experts that transformers exchanges, names that it renames, a head with a tied bias, a class of another config,
# weights that modules multiply themselves, weights that initialising asks for
FEW = ["llama4_text", "llava", "gpt_neox", "bert", "mllama", "mamba", "gpt_bigcode", "gemma3n_text", "aria_text"]
# stock code scales weights in place when it first computes; packed weights refuse, with an error of ours
SCALES_WEIGHTS = {"rwkv"}
# transformers 5.24 sets a row of the table to zero when it loads any checkpoint of it, of its own making, too
NOT_LOADED_AS_SAVED = {"youtu"}


def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": prompt(seed=4)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=prompt(), **inputs).logits.float()


def check(model_type: str, folder: Path) -> str:
    """Save and load a model of an architecture in every way; returns the layout, or why it was refused."""
    try:
        original = tiny(model_type)
        before = logits(original)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    except Exception as reason:
        pytest.skip(f"its forward needs more than text: {type(reason).__name__}")
    try:
        model = hf_accel.optimize(original, WeightOnlyConfig(bits=8))
        expected = logits(model)
        described = model.config.to_dict()
        model.save_pretrained(folder / "ours")
    except UnsupportedModelError as reason:
        assert not (folder / "ours").exists()
        return f"refused: {reason}"
    assert model.config.to_dict() == described
    again = hf_accel.from_pretrained(folder / "ours")
    if model_type in SCALES_WEIGHTS:
        with pytest.raises(UnsupportedModelError, match="stored in 8 bits"):
            logits(again)
        return "refused by its first forward"
    assert type(again).__name__ == type(model).__name__
    assert same(logits(again), expected)
    public = (folder / "ours" / "model.safetensors").exists()
    for cls in (AutoModelForCausalLM, type(again)):
        if cls is AutoModelForCausalLM and causal_class(again.config) is None:
            continue
        if not public:
            with pytest.raises(OSError, match=r"no file named model\.safetensors"):
                cls.from_pretrained(folder / "ours")
        elif importlib.util.find_spec("compressed_tensors") and model_type not in NOT_LOADED_AS_SAVED:
            compare_weights(again, cls.from_pretrained(folder / "ours"))
    if public:
        again.save_pretrained(folder / "stock")  # of transformers, under names of its own
        assert "quantization_config" not in again.config.to_dict()
        assert same(logits(hf_accel.from_pretrained(folder / "stock")), expected)
    else:
        with pytest.raises(UnsupportedModelError, match=r"hf_accel\.save_pretrained"):
            again.save_pretrained(folder / "stock")
    assert same(logits(hf_accel.restore(model)), before)
    return "published" if public else "private"


def compare_weights(ours: Any, theirs: Any) -> None:
    """Compare the weights of a model that stock transformers loaded with ours, value by value."""
    logits(theirs)  # expands what is packed
    state = theirs.state_dict()
    own: set[str] = set()
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(state[f"{name}.weight"], module.weight.dequantize()), name
            own |= {f"{name}.{buffer}" for buffer in ("codes", "scales", "offsets")}
    for name, tensor in ours.state_dict().items():
        assert name in own or torch.equal(state[name], tensor), name


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), two.nan_to_num())


@pytest.mark.parametrize("model_type", FEW)
def test_some_architectures_come_back(model_type: str, tmp_path: Path) -> None:
    assert not check(model_type, tmp_path).startswith("refused")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in architectures() if name not in FEW])
def test_every_architecture_comes_back(model_type: str, tmp_path: Path) -> None:
    logging.getLogger("architectures").info("%s: %s", model_type, check(model_type, tmp_path))
