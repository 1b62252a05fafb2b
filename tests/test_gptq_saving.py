"""What is written as GPTQ and AutoRound write it: the twin's tensors, their labels, the same bits when read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import UP, gptq, stream
from quantized_files import logits, quantized, wide
from safetensors.torch import load_file, save_file

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.layout import Source
from hf_accel.quantization.files.pack_quantized import PackQuantized
from hf_accel.quantization.modules.linear import QuantizedLinear

VERSIONS = {"gptq": 1, "gptq_v2": 2, "auto-round": 2}


def one(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return wide(dtype, num_hidden_layers=1, **changes)


def read(folder: Path, file: str = "config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / file).read_text())
    return content["quantization_config"] if file == "config.json" else content


def by_the_twin(weight: Affine, dtype: torch.dtype, version: int) -> dict[str, torch.Tensor]:
    half = 1 << weight.scheme.bits - 1
    zeros = torch.zeros_like(weight.scales, dtype=torch.int8) if weight.zeros is None else weight.zeros
    return gptq(
        (weight.codes.int() + half).tolist(), (zeros.T.int() + half).tolist(), weight.scales.T.to(dtype),
        weight.scheme.bits, version,
    )  # fmt: skip


CASES = [
    ("gptq", WeightOnlyConfig(bits=4, group_size=32)),
    ("gptq", WeightOnlyConfig(bits=8)),
    ("gptq", WeightOnlyConfig(bits=8, group_size=32)),
    ("gptq_v2", WeightOnlyConfig(bits=3, group_size=32)),
    ("gptq_v2", WeightOnlyConfig(bits=2, group_size=32, symmetric=False)),
    ("gptq_v2", WeightOnlyConfig(bits=4, group_size=32, symmetric=False, head=None)),
    ("auto-round", WeightOnlyConfig(bits=2, group_size=32)),
    ("auto-round", WeightOnlyConfig(bits=3, group_size=32, symmetric=False)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format, config", CASES)
def test_files_are_those_of_the_twin_and_come_back(
    format: str, config: WeightOnlyConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(one(dtype), config)
    hf_accel.save_pretrained(model, tmp_path, format=format)
    stored = load_file(tmp_path / "model.safetensors")
    negative = 0
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        weight = module.packed.unpack()
        negative += int((weight.scales < 0).sum())
        for suffix, tensor in by_the_twin(weight, stored[f"{name}.scales"].dtype, VERSIONS[format]).items():
            assert stored[f"{name}.{suffix}"].dtype is tensor.dtype
            assert torch.equal(stored[f"{name}.{suffix}"], tensor), (name, suffix)
        groups = torch.arange(weight.codes.shape[1], dtype=torch.int32) // weight.scheme.columns_per_scale(
            module.in_features
        )
        assert format == "auto-round" or torch.equal(stored[f"{name}.g_idx"], groups)
        assert torch.equal(stored[f"{name}.scales"].T.float(), weight.scales)
    assert bool(negative) == (config.symmetric and config.bits < 8)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))


def test_the_description_of_gptq(tmp_path: Path) -> None:
    config = WeightOnlyConfig(bits=4, group_size=32, layers={"*.down_proj": 8, "*.k_proj": None})
    hf_accel.save_pretrained(quantized(one(), config), tmp_path, format="gptq")
    assert read(tmp_path) == read(tmp_path, "quantize_config.json") | {"dynamic": read(tmp_path)["dynamic"]}
    eight = {"bits": 8, "group_size": -1, "sym": True}
    assert read(tmp_path) == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": True, "quant_method": "gptq",
        "checkpoint_format": "gptq", "pack_dtype": "int32", "true_sequential": False,
        "dynamic": {
            r"+:^model\.layers\.0\.mlp\.down_proj$": eight,
            "+:^lm_head$": eight,
            r"-:^model\.layers\.0\.self_attn\.k_proj$": {},
        },
    }  # fmt: skip


def test_siblings_with_one_rule_have_it_under_their_joint_name(tmp_path: Path) -> None:
    layers: dict[str, int | None] = {"*.q_proj": None, "*.k_proj": None, "*.v_proj": None, "*.gate_proj": 8}
    for joint in (False, True):
        config = WeightOnlyConfig(group_size=32, layers=layers, head=None)
        hf_accel.save_pretrained(quantized(one(), config), tmp_path, format="gptq")
        rules = read(tmp_path)["dynamic"]
        assert rules[r"-:^model\.layers\.0\.self_attn\.qkv_proj$"] == {}
        assert (r"+:^model\.layers\.0\.mlp\.gate_up_proj$" in rules) == joint
        layers["*.up_proj"] = 8
    assert rules[r"+:^model\.layers\.0\.mlp\.gate_up_proj$"] == {"bits": 8, "group_size": -1, "sym": True}


def test_the_description_of_autoround(tmp_path: Path) -> None:
    config = WeightOnlyConfig(bits=2, group_size=32, layers={"*.down_proj": 3, "*.k_proj": None})
    hf_accel.save_pretrained(quantized(one(), config), tmp_path, format="auto-round")
    assert not (tmp_path / "quantize_config.json").exists()
    assert read(tmp_path) == {
        "bits": 2, "group_size": 32, "sym": True, "data_type": "int", "quant_method": "auto-round",
        "packing_format": "auto_round", "block_name_to_quantize": "model.layers",
        "extra_config": {
            "model.layers.0.mlp.down_proj": {"bits": 3, "group_size": 32, "sym": True, "data_type": "int"},
            "lm_head": {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"},
            "model.layers.0.self_attn.k_proj": {"bits": 16, "act_bits": 16},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "format, config, changes, named",
    [
        ("gptq", WeightOnlyConfig(bits=3, group_size=32), {}, "has 3 bits; .*format='gptq_v2'"),
        ("gptq", WeightOnlyConfig(bits=4, group_size=32, symmetric=False), {}, "zeros of its own; .*format='gptq_v2'"),
        ("gptq", WeightOnlyConfig(bits=4), {"vocab_size": 130}, "lm_head has 130 rows .*head=None"),
        ("gptq", WeightOnlyConfig(bits=8), {"intermediate_size": 72}, r"72 rows .*layers=.*gate_proj.*None"),
        ("auto-round", WeightOnlyConfig(bits=8, embeddings=8), {}, "embed_tokens is a packed table.*embeddings=None"),
        ("compressed-tensors", WeightOnlyConfig(bits=8, embeddings=8), {}, "embed_tokens is a packed table"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    format: str, config: WeightOnlyConfig, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = quantized(one(**changes), config)
    with pytest.raises(hf_accel.UnsupportedModelError, match=named):
        hf_accel.save_pretrained(model, tmp_path / "folder", format=format)
    assert not (tmp_path / "folder").exists()
    hf_accel.save_pretrained(model, tmp_path / "folder")


def test_formats_that_do_not_exist_and_models_that_have_none(tmp_path: Path) -> None:
    with pytest.raises(hf_accel.ConfigError, match="'gptq_v2', 'auto-round', 'mxfp4', or None; 'awq' was given"):
        hf_accel.save_pretrained(quantized(one(), WeightOnlyConfig(bits=8)), tmp_path / "folder", format="awq")
    with pytest.raises(hf_accel.UnsupportedModelError, match="has none to save"):
        hf_accel.save_pretrained(one(), tmp_path / "folder", format="gptq")
    assert not (tmp_path / "folder").exists()


def test_a_folder_is_of_the_last_format_saved_into_it(tmp_path: Path) -> None:
    model = quantized(one(), WeightOnlyConfig(bits=4, group_size=32))
    expected = logits(model)
    for format in ("gptq", "auto-round", "gptq_v2", None, "gptq"):
        hf_accel.save_pretrained(model, tmp_path, format=format, max_shard_size="20kB")
        assert (tmp_path / "quantize_config.json").exists() == (format in ("gptq", "gptq_v2"))
        assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("value, dtype", [(0.5, torch.float16), (2.0**-30, torch.bfloat16), (0.1, torch.float32)])
def test_scales_are_of_the_smallest_dtype_that_holds_them(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(one(), WeightOnlyConfig(bits=8, head=None))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.scales = torch.full(module.scales.shape, value).bfloat16().float().view(torch.int32)
            if dtype is torch.float32:
                module.scales = torch.full(module.scales.shape, value).view(torch.int32)
    hf_accel.save_pretrained(model, tmp_path, format="gptq")
    assert load_file(tmp_path / "model.safetensors")[f"{UP}.scales"].dtype is dtype
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_as_compressed_tensors_stored_them_at_first(symmetric: bool, tmp_path: Path) -> None:
    """Ten codes per word, told by the width: 64 columns take 7 words instead of 6."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(-4, 4, (32, 64), dtype=torch.int8, generator=draw)
    zeros = torch.randint(-4, 4, (32, 2), dtype=torch.int8, generator=draw)

    def words(values: list[int]) -> list[int]:
        return [stream(values[start : start + 10], 3)[0] for start in range(0, len(values), 10)]

    tensors = {
        "a.weight_packed": torch.tensor([words(row) for row in (codes + 4).tolist()], dtype=torch.int32),
        "a.weight_scale": torch.randn(32, 2, generator=draw),
        "a.weight_shape": torch.tensor([32, 64]),
    }
    if not symmetric:
        columns = [words(row) for row in (zeros.T + 4).tolist()]
        tensors["a.weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    layout = PackQuantized(Scheme(3, 32, symmetric))
    found = layout.read(Source(Checkpoint(tmp_path, "model"), "a"), 32, 64).weight
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scales, tensors["a.weight_scale"])
    assert symmetric or (found.zeros is not None and torch.equal(found.zeros, zeros))
