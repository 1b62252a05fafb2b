"""Experts in GGUF files: blocks as they lie, rows of gate above those of up; text is that of the file's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import SIZES, metadata, quantized
from models import Tiny, prompt, randomize
from transformers import AutoConfig, AutoModelForCausalLM

from hf_accel.errors import CheckpointError
from hf_accel.quantization.gguf.loading import load_gguf
from hf_accel.quantization.modules.experts import QuantizedExperts

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 96}
TINY = {
    "gpt-oss": Tiny("gpt_oss", SIZES | EXPERTS | {"sliding_window": 8}),
    "qwen3moe": Tiny("qwen3_moe", SIZES | EXPERTS | {"decoder_sparse_step": 1, "norm_topk_prob": True}),
}


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(TINY[name].model_type, **TINY[name].config))
    randomize(model, TINY[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def halves(name: str, stacked: torch.Tensor, is_weight: bool) -> list[torch.Tensor]:
    """Return gate and up, [experts, I(, H)], on the memory of a stacked parameter."""
    if name == "gpt-oss":  # [experts, H, 2 I], by turns
        rows = stacked.mT if is_weight else stacked
        return [rows[:, ::2], rows[:, 1::2]]
    return list(stacked.chunk(2, dim=1))


def write(path: Path, name: str, kind: str, change: Any = lambda tensors: None) -> Any:
    """Write a tiny mixture and return the model with the package's dequantization of what was written."""
    model = build(name)
    config = model.config
    writer = gguf.GGUFWriter(str(path), name)
    metadata(writer, config)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(96)
    if name == "gpt-oss":
        writer.add_sliding_window(8)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[name]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    places: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        stem, _, suffix = key.rpartition(".")
        if not stem.endswith(".experts"):
            stored = table.get_name(stem)
            places[f"{stored}.{suffix}" if stored else f"{table.get_name(key)}.weight"] = tensor
    for layer, block in enumerate(model.model.layers):
        experts = block.mlp.experts
        gate, up = halves(name, experts.gate_up_proj.data, True)
        down = experts.down_proj.data.mT if name == "gpt-oss" else experts.down_proj.data
        places |= {
            f"blk.{layer}.ffn_{part}_exps.weight": t for part, t in zip(("gate", "up", "down"), (gate, up, down))
        }
        if name == "gpt-oss":
            gate, up = halves(name, experts.gate_up_proj_bias.data, False)
            parts = (gate, up, experts.down_proj_bias.data)
            places |= {f"blk.{layer}.ffn_{part}_exps.bias": t for part, t in zip(("gate", "up", "down"), parts)}
    change(places)
    with torch.no_grad():
        for key, tensor in places.items():
            values = tensor.float().contiguous().numpy()
            is_packed = key.endswith("_exps.weight") or (".attn_" in key and tensor.dim() > 1)
            type_ = gguf.GGMLQuantizationType[kind if is_packed else "F32"]
            data = quantized(values, type_)
            writer.add_tensor(key, data, raw_dtype=type_)
            tensor.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(data, type_))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kind", ["MXFP4", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", TINY)
def test_experts_are_packed_as_they_lie(name: str, kind: str, tmp_path: Path) -> None:
    twin = write(tmp_path / "x.gguf", name, kind)
    found = load_gguf(tmp_path / "x.gguf", torch.float32)
    assert found.is_close
    for mine, theirs in zip(found.model.model.layers, twin.model.layers, strict=True):
        assert isinstance(mine.mlp.experts, QuantizedExperts)
        gate, up = halves(name, theirs.mlp.experts.gate_up_proj.data, True)
        for index, product in enumerate(mine.mlp.experts.gate_up_proj):
            assert torch.equal(product.packed.dequantize(), torch.cat((gate[index], up[index])))
    ids = prompt(2, 24)
    with torch.no_grad():
        ours, expected = found.model(ids).logits, twin(ids).logits
    # activations in 8 bits send some tokens to other experts: most logits are close, not all
    bound = 1e-2 if kind == "Q8_0" else 0.1
    assert (ours - expected).abs().median() <= bound * expected.abs().median()
    assert found.types[kind] == 2 * (2 * 4 + 4)


@pytest.mark.parametrize("name", TINY)
def test_experts_that_are_values_stay_so(name: str, tmp_path: Path) -> None:
    twin = write(tmp_path / "x.gguf", name, "F32")
    model = load_gguf(tmp_path / "x.gguf", torch.float32).model
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in twin.state_dict().items())
    assert torch.equal(model(prompt(2, 24)).logits, twin(prompt(2, 24)).logits)


def test_an_expert_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "gpt-oss", "MXFP4", lambda places: places.pop("blk.1.ffn_up_exps.weight") is None)
    with pytest.raises(CheckpointError, match=r"lacks the tensor blk\.1\.ffn_up_exps\.weight"):
        load_gguf(tmp_path / "x.gguf")
