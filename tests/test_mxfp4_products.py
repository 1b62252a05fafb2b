"""Single products in MXFP4 as compressed-tensors stores them (`mxfp4-pack-quantized`), read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import difference, logits, wide
from safetensors.torch import load_file, save_file
from test_mxfp4_files import packed, unpacked
from torch import nn

import hf_accel
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme, quantize
from hf_accel.quantization import QuantizedLinear

WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
FORMAT = "mxfp4-pack-quantized"


def description(**changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": WEIGHTS | changes, "format": FORMAT}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def written(folder: Path, **changes: Any) -> Path:
    model = wide(torch.bfloat16, num_hidden_layers=1)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            blocks, scales = packed(tensors.pop(f"{name}.weight")[None])
            tensors |= {f"{name}.weight_packed": blocks[0].flatten(1), f"{name}.weight_scale": scales[0]}
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": description(**changes)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def products(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_products_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path) / "model.safetensors")
    found = products(hf_accel.from_pretrained(tmp_path))
    assert len(found) == 7
    for name, product in found.items():
        blocks, scales = (tensors[f"{name}.weight_{kind}"] for kind in ("packed", "scale"))
        expected = unpacked(blocks.unflatten(-1, (-1, 16))[None], scales[None])[0]
        assert torch.equal(product.packed.dequantize(torch.float64), expected)
        again = product.packed.to_mxfp4()
        assert torch.equal(again[0], blocks)
        assert torch.equal(again[1], scales)


@pytest.mark.compressed_tensors
def test_the_package_reads_the_same_weights(tmp_path: Path) -> None:
    from compressed_tensors.compressors import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors = load_file(written(tmp_path) / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**WEIGHTS))
    for name, product in products(hf_accel.from_pretrained(tmp_path)).items():
        state = {kind: tensors[f"{name}.{kind}"] for kind in ("weight_packed", "weight_scale")}
        expected = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(product.packed.dequantize(), expected.float())


def test_what_is_saved_comes_back_and_has_the_names_of_the_package(tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(written(tmp_path / "one"))
    hf_accel.save_pretrained(model, tmp_path / "two")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    described = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "compressed-tensors"
    assert described["format"] == FORMAT
    (group,) = described["config_groups"].values()
    assert group["format"] == FORMAT
    assert {name: group["weights"][name] for name in WEIGHTS if name != "zp_dtype"} == {
        name: value for name, value in WEIGHTS.items() if name != "zp_dtype"
    }
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "two")), logits(model))


def test_beside_whole_numbers_each_group_says_its_format(tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(written(tmp_path / "one"))
    eight = PackedWeight.pack(quantize(model.lm_head.weight, Scheme(8), torch.bfloat16))
    model.lm_head = QuantizedLinear(eight, None, torch.bfloat16)
    expected = logits(model)
    hf_accel.save_pretrained(model, tmp_path / "two")
    described = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert described["format"] == "mixed-precision"
    assert {group["format"] for group in described["config_groups"].values()} == {FORMAT, "pack-quantized"}
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "two")), expected)


@pytest.mark.compressed_tensors
def test_stock_opens_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = hf_accel.from_pretrained(written(tmp_path / "one"))
    hf_accel.save_pretrained(model, tmp_path / "two")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    ours = hf_accel.from_pretrained(tmp_path / "two", dtype=torch.float64)
    assert difference(logits(ours), logits(theirs)) < 2e-2


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "auto-round"])
def test_formats_of_whole_numbers_are_refused(format: str, tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(written(tmp_path / "one"))
    with pytest.raises(hf_accel.UnsupportedModelError, match="MXFP4, and its words hold whole numbers"):
        hf_accel.save_pretrained(model, tmp_path / "two", format=format)
    assert not (tmp_path / "two" / "config.json").exists()


@pytest.mark.parametrize(
    "changes", [{"type": "int"}, {"num_bits": 8}, {"group_size": 16}, {"strategy": "tensor_group"}], ids=str
)
def test_other_descriptions_in_this_format_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(hf_accel.CheckpointError, match="describes"):
        hf_accel.from_pretrained(written(tmp_path, **changes))


@pytest.mark.parametrize("kind", ["missing", "shape", "NaN"])
def test_damaged_tensors_are_named(kind: str, tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    if kind == "missing":
        del tensors[name]
    elif kind == "shape":
        tensors[name] = tensors[name][:, 1:].contiguous()
    else:
        tensors[name][3, 1] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(hf_accel.CheckpointError, match=r"up_proj\.weight_scale"):
        hf_accel.from_pretrained(tmp_path)
