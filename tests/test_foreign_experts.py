"""Experts in files of other programs: each product by itself, gate and up in one, all experts in one; their biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import Written, described, stream
from heads import model_of
from models import SMALL, Tiny, prompt
from torch import Tensor

import hf_accel
from hf_accel.quantization.modules.experts import QuantizedExperts

COUNT, SIZE = 4, 64
GPT_OSS = Tiny("gpt_oss", SMALL | {"head_dim": 16, "num_local_experts": COUNT, "num_experts_per_tok": 2}
               | {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1})  # fmt: skip
QWEN = Tiny("qwen3_moe", SMALL | {"head_dim": 16, "num_experts": COUNT, "num_experts_per_tok": 2}
            | {"hidden_size": SIZE, "moe_intermediate_size": 32, "num_hidden_layers": 1})  # fmt: skip
EXPERTS = "model.layers.0.mlp.experts"
PARTS = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, Tensor]


def by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """The last dimension of two tensors, one of each by turns."""
    return torch.stack((gate, up), dim=-1).flatten(-2)


def apart(tensors: Tensors) -> None:
    """As llm-compressor and AutoRound write them: gate, up and down of every expert, each with its bias."""
    both, down = tensors.pop(f"{EXPERTS}.gate_up_proj_bias"), tensors.pop(f"{EXPERTS}.down_proj_bias")
    for i in range(COUNT):
        for part, bias in zip(PARTS, (both[i, ::2], both[i, 1::2], down[i]), strict=True):
            tensors[f"{EXPERTS}.{i}.{part}.bias"] = bias.clone()


def joined(tensors: Tensors, gate_up: str = "gate_up.{}", last: str = "down.{}") -> None:
    """As GPTQModel writes gpt-oss: gate and up of an expert in one, rows by turns as in the model."""
    apart(tensors)
    for i in range(COUNT):
        for kind in ("qweight", "scales", "bias"):
            gate, up = (tensors.pop(f"{EXPERTS}.{i}.{part}.{kind}") for part in PARTS[:2])
            tensors[f"{EXPERTS}.{gate_up.format(i)}.{kind}"] = by_turns(gate, up)
        zeros = [tensors.pop(f"{EXPERTS}.{i}.{part}.qzeros") for part in PARTS[:2]]  # all alike in symmetric files
        tensors[f"{EXPERTS}.{gate_up.format(i)}.qzeros"] = torch.cat(zeros, dim=1)
        tensors[f"{EXPERTS}.{gate_up.format(i)}.g_idx"] = tensors.pop(f"{EXPERTS}.{i}.gate_proj.g_idx")
        del tensors[f"{EXPERTS}.{i}.up_proj.g_idx"]
        for kind in ("qweight", "scales", "bias", "qzeros", "g_idx"):
            tensors[f"{EXPERTS}.{last.format(i)}.{kind}"] = tensors.pop(f"{EXPERTS}.{i}.down_proj.{kind}")


def stacked(tensors: Tensors) -> None:
    """The same with all experts in one tensor, which its later versions write."""
    joined(tensors)
    for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
        for kind in ("qweight", "scales", "bias", "qzeros", "g_idx"):
            found = [tensors.pop(f"{EXPERTS}.{part}.{i}.{kind}") for i in range(COUNT)]
            tensors[f"{EXPERTS}.{name}" + ("_bias" if kind == "bias" else f".{kind}")] = torch.stack(found)


SPELLINGS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "apart": (apart, f"{EXPERTS}.2.up_proj.qweight"),
    "joined": (joined, f"{EXPERTS}.gate_up.2.qweight"),
    "joined as they were": (lambda t: joined(t, "gate_up_projs.{}", "down_projs.{}"), f"{EXPERTS}.down_projs.3.bias"),
    "stacked": (stacked, f"{EXPERTS}.down_proj.scales"),
}


def check(folder: Path, weights: Tensors) -> Any:
    model = hf_accel.from_pretrained(folder)
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, QuantizedExperts)
    for i in range(COUNT):
        gate, up, down = (weights[f"{EXPERTS}.{i}.{part}"] for part in PARTS)
        assert torch.equal(experts.gate_up_proj[i].weight.dequantize(), torch.cat((gate, up)))
        assert torch.equal(experts.down_proj[i].weight.dequantize(), down)
    with torch.no_grad():
        assert model(prompt()).logits.isfinite().all()
    return experts


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_experts_of_gpt_oss(spelling: str, tmp_path: Path) -> None:
    change, some = SPELLINGS[spelling]
    written = Written(
        tmp_path, "v1", described(), model=model_of(GPT_OSS), experts=PARTS, architecture="GptOssForCausalLM"
    )
    before = dict(written.tensors)
    written.edit(change)
    experts = check(tmp_path, written.weights)
    for i in range(COUNT):
        bias = before[f"{EXPERTS}.gate_up_proj_bias"][i]
        assert torch.equal(experts.gate_up_proj[i].bias, torch.cat((bias[::2], bias[1::2])))
        assert torch.equal(experts.down_proj[i].bias, before[f"{EXPERTS}.down_proj_bias"][i])
    written.edit(lambda tensors: tensors.pop(some))
    with pytest.raises(hf_accel.CheckpointError, match=some.replace(".", r"\.")):
        hf_accel.from_pretrained(tmp_path)


def test_experts_of_compressed_tensors(tmp_path: Path) -> None:
    """A group for a class of modules speaks of products of experts, too, wherever they are stored."""
    written = Written(tmp_path, "v2", {}, model=model_of(QWEN), experts=PARTS, architecture="Qwen3MoeForCausalLM")

    def change(tensors: Tensors) -> None:
        for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            words, scales = tensors.pop(f"{name}.qweight"), tensors.pop(f"{name}.scales")
            codes = [[int(word) >> 4 * i & 15 for word in column for i in range(8)] for column in words.T]
            packed = torch.tensor([stream(row, 4) for row in codes]).to(torch.int64)
            tensors[f"{name}.weight_packed"] = torch.where(packed > 2**31 - 1, packed - 2**32, packed).int()
            tensors[f"{name}.weight_scale"] = scales.T.contiguous()
            tensors[f"{name}.weight_shape"] = torch.tensor([len(codes), len(codes[0])])
            del tensors[f"{name}.qzeros"], tensors[f"{name}.g_idx"]

    written.edit(change)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(tmp_path, written.weights)
    written.edit(lambda tensors: tensors.pop(f"{EXPERTS}.3.down_proj.weight_packed"))
    with pytest.raises(hf_accel.CheckpointError, match=r"experts\.3\.down_proj"):
        hf_accel.from_pretrained(tmp_path)
