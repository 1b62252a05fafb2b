"""The published format against its own package: it reads what we write, we read its files, modules change hands."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NAMES, build
from quantized_files import PRIVATE, difference, logits, saved, wide
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel import CompressedTensorsConfig, WeightOnlyConfig
from hf_accel.quantization.modules.linear import QuantizedLinear

SCHEMES = {
    "int4": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True},
    "int4-zeros": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False},
    "int8": {"num_bits": 8, "group_size": None, "strategy": "channel", "symmetric": True},
    "int8-zeros": {"num_bits": 8, "group_size": None, "strategy": "channel", "symmetric": False},
}


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_package_reads_our_weights(bits: int, symmetric: bool, tmp_path: Path) -> None:
    if bits == 8 and not symmetric:
        pytest.skip("WeightOnlyConfig makes no such weights")
    config = WeightOnlyConfig(bits=bits, group_size=32 if bits < 8 else None, symmetric=symmetric)
    expected = saved(tmp_path, wide(), config)
    ours = hf_accel.from_pretrained(tmp_path)
    theirs = expanded_by_the_package(tmp_path)
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(theirs[f"{name}.weight"], module.packed.dequantize(torch.float32)), name
    plain = wide()
    plain.load_state_dict(theirs)
    assert difference(logits(plain), expected) < (1e-3 if bits == 8 else 0.1)
    if symmetric:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    else:  # transformers cannot load any such checkpoint (llm-compressor issue 1618); it says so
        with pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def expanded_by_the_package(folder: Path) -> dict[str, torch.Tensor]:
    """The state of a plain model: every weight decompressed by compressed-tensors, by the description in the config."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    state = load_file(folder / "model.safetensors")
    described = QuantizationConfig.model_validate(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    for scheme in described.config_groups.values():
        for name in scheme.targets:
            own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.weight_")}
            tensors = {key.rpartition(".")[2]: tensor for key, tensor in own.items()}
            state[f"{name}.weight"] = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    return state


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PRIVATE])
def test_the_package_computes_the_same_function(name: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, build(name), WeightOnlyConfig(bits=8))
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected) < 1e-3


def written_by_the_package(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Quantize a llama with compressed-tensors, compress and save it; returns the model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = wide(dtype)
    weights = SCHEMES[kind] | {"type": "int", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            rows, columns = module.weight.shape
            grouped = module.weight.detach().reshape(rows, -1, weights["group_size"] or columns)
            scale, zero = calculate_qparams(*grouped.aminmax(dim=-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return model


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCHEMES)
def test_checkpoints_of_the_package_are_read(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = logits(written_by_the_package(tmp_path / "theirs", kind, dtype))
    model = hf_accel.from_pretrained(tmp_path / "theirs")
    assert type(model.lm_head) is torch.nn.Linear
    bound = 0.1 if SCHEMES[kind]["num_bits"] == 4 else 1e-3 if dtype is torch.float32 else 0.05
    assert difference(logits(model), expected) < bound
    hf_accel.save_pretrained(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype is ours[name].dtype
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("kind", SCHEMES)
def test_stock_modules_are_taken_over(kind: str, expanded: bool, tmp_path: Path) -> None:
    model = written_by_the_package(tmp_path / "theirs", kind, torch.bfloat16)
    expected = logits(copy.deepcopy(model))
    if SCHEMES[kind]["symmetric"]:  # transformers loads no others
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    if expanded:
        logits(model)
    kinds = [type(module) for module in model.modules()]
    hf_accel.optimize(model, CompressedTensorsConfig())
    ours = logits(model)
    again = logits(hf_accel.from_pretrained(tmp_path / "theirs"))
    if expanded and kind == "int8-zeros":  # 256 distances from zero are more than bf16 tells apart
        assert difference(ours, again) < 0.05
    else:
        assert torch.equal(ours, again)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "ours")), ours)
    hf_accel.restore(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model), expected)


@pytest.mark.compressed_tensors
def test_what_is_not_the_packages_or_was_changed_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(hf_accel.UnsupportedModelError, match="not loaded from a compressed-tensors checkpoint"):
        hf_accel.optimize(wide(), CompressedTensorsConfig())
    written_by_the_package(tmp_path, "int4", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    module = model.model.layers[0].mlp.up_proj
    scheme, module.quantization_scheme = module.quantization_scheme, module.quantization_scheme.model_copy(deep=True)
    module.quantization_scheme.weights.__dict__["actorder"] = "group"  # as releases before 0.19 loaded it
    module.weight_g_idx = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"mlp\.up_proj has groups .* in an order of its own"):
        hf_accel.optimize(model, CompressedTensorsConfig())
    module.quantization_scheme = scheme
    logits(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"mlp\.up_proj: its weight is not what codes"):
        hf_accel.optimize(model, CompressedTensorsConfig())
