"""Checkpoints of GPTQ, AutoRound and AWQ, as twins of their packers write them, are read to bit-equal weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import UP, Written, described, shuffled
from models import TINY, randomize
from quantized_files import WIDE, difference, logits, wide
from transformers import AutoConfig, AutoModelForCausalLM

import hf_accel
from hf_accel.quantization.files.foreign import AutoRoundDescription
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.modules.permuted import PermutedLinear

AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def check(written: Written, packed: int = 7) -> Any:
    """Load the folder and find every weight as the formula has it, to the bit; returns the model."""
    model = hf_accel.from_pretrained(written.folder)
    products = {
        name: module for name, module in model.named_modules() if isinstance(module, (QuantizedLinear, PermutedLinear))
    }
    products = {name: module for name, module in products.items() if not name.endswith(".inner")}
    assert products.keys() == written.weights.keys()
    assert len(products) == packed
    for name, module in products.items():
        found = module.weight.dequantize()
        assert torch.equal(found, written.weights[name].to(found.dtype)), name
    assert difference(logits(model), logits(written.plain())) < 0.1
    return model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_and_versions(bits: int, symmetric: bool, version: int, tmp_path: Path) -> None:
    label = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    description = described(bits, sym=symmetric, **label)
    check(Written(tmp_path, f"v{version}", description, bits=bits, symmetric=symmetric))


@pytest.mark.parametrize("bits", [3, 4])
def test_one_scale_per_channel(bits: int, tmp_path: Path) -> None:
    model = check(Written(tmp_path, "v1", described(bits, -1), bits=bits, group=-1))
    assert model.get_submodule(UP).scheme.group_size is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_of_every_dtype_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    written = Written(tmp_path, "v2", described(format="gptq_v2"), scale_dtype=dtype)
    model = check(written)
    scales = model.get_submodule(UP).packed.unpack().scales
    assert torch.equal(scales, written.tensors[f"{UP}.scales"].T.float())
    assert bool((scales < 0).any())
    assert bool((scales > 0).any())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_columns_in_the_order_of_activations(bits: int, symmetric: bool, tmp_path: Path) -> None:
    description = described(bits, desc_act=True, sym=symmetric, checkpoint_format="gptq_v2")
    model = check(Written(tmp_path / "a", "v2", description, bits=bits, symmetric=symmetric, index=shuffled(32)))
    assert type(model.get_submodule(UP)) is PermutedLinear
    expected = logits(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    hf_accel.optimize(model)
    # attention of prompts may be another kernel's
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), text)
    hf_accel.restore(model)
    for format in (None, "gptq_v2"):
        hf_accel.save_pretrained(model, tmp_path / "again", format=format)
        assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "again")), expected)


def test_gradients_pass_through_a_permutation(tmp_path: Path) -> None:
    written = Written(tmp_path, "v1", described(desc_act=True), index=shuffled(32))
    module = hf_accel.from_pretrained(tmp_path).get_submodule(UP)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, written.weights[UP].sum(0).expand(3, -1), atol=1e-5)


def test_negative_groups_count_from_the_end(tmp_path: Path) -> None:
    written = Written(tmp_path, "v1", described(), index=shuffled(32))

    def negate(tensors: Any) -> None:
        index = tensors[f"{UP}.g_idx"]
        index[index == 1] = -1

    written.edit(negate)
    check(written)


def test_the_last_group_may_be_shorter(tmp_path: Path) -> None:
    """96 columns in groups of 64: the second has 32."""
    model = check(Written(tmp_path, "v1", described(group=64), group=64))
    assert model.model.layers[0].mlp.down_proj.scheme.group_size == 32


def test_groups_larger_than_rows_are_rows(tmp_path: Path) -> None:
    check(Written(tmp_path, "v1", described(group=128), group=128))


def test_rules_by_name(tmp_path: Path) -> None:
    rules = {
        r"-:.*\.1\.self_attn\..*": {},
        r".*\.down_proj": {"bits": 2},
    }

    def bits_of(name: str) -> int | None:
        if ".1.self_attn." in name:
            return None
        return 2 if name.endswith("down_proj") else 4

    model = check(
        Written(tmp_path, "v1", described(dynamic=rules), bits_of=bits_of, model=wide(num_hidden_layers=2)), packed=10
    )
    assert model.model.layers[1].mlp.down_proj.scheme.bits == 2
    assert type(model.model.layers[1].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    "beside, description",
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.01}),
        ("quantize_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": False}),
        ("quantize_config.json", {"bits": 4, "group_size": 32}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_old_names_and_files(beside: str, description: dict[str, Any], tmp_path: Path) -> None:
    layout = "awq" if beside == "quant_config.json" else "v1"
    check(Written(tmp_path, layout, description, beside=beside, file="gptq_model-4bit-32g.safetensors"))


def test_what_the_file_beside_adds(tmp_path: Path) -> None:
    written = Written(tmp_path, "v2", described(sym=False), symmetric=False)
    (tmp_path / "quantize_config.json").write_text(json.dumps(described(sym=False, format="gptq_v2")))
    check(written)


@pytest.mark.parametrize("label, version", [("gptq", 2), ("gptq_v2", 1)])
def test_a_label_that_lies_of_symmetric_weights_is_seen(label: str, version: int, tmp_path: Path) -> None:
    check(Written(tmp_path, f"v{version}", described(checkpoint_format=label)))


def test_biases_and_the_zeros_that_old_packers_left(tmp_path: Path) -> None:
    written = Written(tmp_path, "v1", described(), model=wide(attention_bias=True, num_hidden_layers=1))
    written.edit(lambda tensors: tensors.update({f"{UP}.bias": torch.zeros(96)}))
    assert check(written).get_submodule(UP).bias is None
    written = Written(
        tmp_path,
        "v1",
        described(desc_act=True),
        model=wide(attention_bias=True, num_hidden_layers=1),
        index=shuffled(32),
    )
    check(written)


def test_groups_by_activation_of_compressed_tensors(tmp_path: Path) -> None:
    """The same codes as GPTQ's, transposed, and `weight_g_idx`: made of what a GPTQ twin wrote."""
    written = Written(tmp_path, "v2", described(3, sym=False), bits=3, symmetric=False, index=shuffled(32))

    def renamed(tensors: dict[str, Any]) -> None:
        for name, weight in written.weights.items():
            found = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx")}
            tensors |= {
                f"{name}.weight_packed": found["qweight"].T.contiguous(),
                f"{name}.weight_zero_point": found["qzeros"].T.contiguous(),
                f"{name}.weight_scale": found["scales"].T.contiguous(),
                f"{name}.weight_g_idx": found["g_idx"],
                f"{name}.weight_shape": torch.tensor(weight.shape),
            }

    written.edit(renamed)
    weights = {
        "num_bits": 3,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "actorder": "group",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(written)
    written.edit(lambda tensors: tensors.pop(f"{UP}.weight_g_idx"))
    with pytest.raises(hf_accel.CheckpointError, match=rf"lacks the tensor {UP}\.weight_g_idx"):
        hf_accel.from_pretrained(tmp_path)


EXPERTS = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("MixtralForCausalLM", ("w1", "w3", "w2")),
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("layout", ["v1", "v2", "awq"])
def test_experts_one_by_one(layout: str, name: str, tmp_path: Path) -> None:
    tiny, (architecture, parts) = TINY[name], EXPERTS[name]
    sizes = WIDE | {"moe_intermediate_size": 32, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **tiny.config | sizes)).eval()
    randomize(model, tiny)
    label = {"v1": "gptq", "v2": "gptq_v2"}.get(layout)
    description = AWQ if label is None else described(sym=layout == "v1", checkpoint_format=label)
    written = Written(
        tmp_path, layout, description, symmetric=layout == "v1", model=model, experts=parts, architecture=architecture
    )
    stored = ".block_sparse_moe." if name == "mixtral" else ".mlp."  # the names of Mixtral's files are older
    written.edit(lambda tensors: [tensors.update({k.replace(".mlp.", stored): tensors.pop(k)}) for k in list(tensors)])
    found = hf_accel.from_pretrained(tmp_path)
    [(path, experts)] = [(path, m) for path, m in found.named_modules() if isinstance(m, QuantizedExperts)]
    gate, up, down = ([written.weights[f"{path}.{i}.{part}"] for i in range(experts.num_experts)] for part in parts)
    for index in range(experts.num_experts):
        assert torch.equal(experts.gate_up_proj[index].weight.dequantize(), torch.cat((gate[index], up[index])))
        assert torch.equal(experts.down_proj[index].weight.dequantize(), down[index])
    assert logits(found).isfinite().all()
    written.edit(lambda tensors: tensors.pop(f"{path}.1.{parts[2]}.qweight".replace(".mlp.", stored)))
    with pytest.raises(hf_accel.CheckpointError, match=rf"experts\.1\.{parts[2]}\.qweight"):
        hf_accel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "packing, version", [("auto_round", 2), ("auto_round:gptqmodel", 2), ("auto_round:auto_gptq", 1)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_packings_of_autoround(packing: str, version: int, symmetric: bool, tmp_path: Path) -> None:
    description = AUTOROUND | {"packing_format": packing, "sym": symmetric, "bits": 2}
    check(Written(tmp_path, f"v{version}", description, bits=2, symmetric=symmetric, has_index=version == 1))


def test_mixed_bits_of_autoround(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        r".*\.down_proj": {"bits": 3},
        "model.layers.0.mlp.gate_proj": {"bits": 16, "data_type": "fp"},
    }

    def bits_of(name: str) -> int | None:
        if name == "model.layers.0.mlp.gate_proj":
            return None
        return 8 if name == "model.layers.0.self_attn.q_proj" else 3 if name.endswith("down_proj") else 4

    description = AUTOROUND | {"packing_format": "auto_round", "extra_config": extra}
    check(Written(tmp_path, "v2", description, bits_of=bits_of, has_index=False), packed=6)


def test_a_full_name_of_autoround_is_no_pattern_for_other_modules() -> None:
    description = AUTOROUND | {"packing_format": "auto_round", "extra_config": {"a.gate": {"bits": 2}}}
    rules: Any = AutoRoundDescription(description, "config.json")
    assert rules.layout("a.gate_proj", None, {"a.gate.weight", "a.gate_proj.qweight"}).bits == 4
    assert rules.layout("a.gate_proj", None, {"a.gate_proj.qweight"}).bits == 2  # then it is one


@pytest.mark.parametrize("layout", ["awq", "gemv"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(symmetric: bool, layout: str, tmp_path: Path) -> None:
    version = {"awq": "gemm", "gemv": "gemv"}[layout]
    check(Written(tmp_path / "a", layout, AWQ | {"version": version}, symmetric=symmetric))
    if layout == "awq":
        description = AUTOROUND | {"packing_format": "auto_round:auto_awq", "sym": symmetric}
        check(Written(tmp_path / "b", "awq", description, symmetric=symmetric))
