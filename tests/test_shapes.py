"""Named shapes are those of the published models, and built packed they are what quantizing the whole model gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.cli import app
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.measure import SHAPES, build_shape, shape_config
from hf_accel.quantization import targets
from hf_accel.quantization.building import build_packed
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear

# weights in billions, as the model cards have them
PUBLISHED = {
    "llama-1b": 1.24, "smollm-135m": 0.13, "llama-8b": 8.03, "granite-1b-a400m": 1.33, "olmoe-1b-7b": 6.92,
    "qwen3-30b-a3b": 30.53, "gpt-oss-20b": 20.91,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "tied": SHAPES["granite-1b-a400m"]
    | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
       "num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "untied": SHAPES["qwen3-30b-a3b"]
    | {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
    "dense": SHAPES["llama-1b"]
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96},
    "clamped": SHAPES["gpt-oss-20b"]
    | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
PROMPT = torch.tensor([[5, 40, 17, 61, 80]])


@pytest.fixture(autouse=True)
def _tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, shape in TINY.items():
        monkeypatch.setitem(SHAPES, name, shape)
    yield
    torch.set_num_threads(before)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_weights_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape_config(name, 2))
        layer, layers = model.model.layers[1], SHAPES[name]["num_hidden_layers"]
    total = sum(p.numel() for p in model.parameters()) + (layers - 2) * sum(p.numel() for p in layer.parameters())
    assert round(total / 1e9, 2) == PUBLISHED[name]


def test_what_the_published_configs_say_beside_sizes() -> None:
    granite, olmoe, qwen, gpt_oss = (shape_config(name) for name in list(PUBLISHED)[3:])
    assert (granite.embedding_multiplier, granite.residual_multiplier) == (12.0, 0.22)
    assert (granite.attention_multiplier, granite.logits_scaling) == (1 / 64, 6.0)
    assert (olmoe.norm_topk_prob, qwen.norm_topk_prob) == (False, True)
    assert [c.num_experts_per_tok for c in (granite, olmoe, qwen, gpt_oss)] == [8, 8, 8, 4]
    assert [c.rope_parameters["rope_theta"] for c in (granite, olmoe, qwen, gpt_oss)] == [1.5e6, 1e4, 1e6, 1.5e5]
    assert (gpt_oss.rope_parameters["rope_type"], gpt_oss.rope_parameters["factor"]) == ("yarn", 32.0)
    assert gpt_oss.layer_types[:2] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TINY)
def test_a_packed_shape_is_what_quantizing_the_whole_model_gives(name: str, bits: int) -> None:
    packed: Any = build_packed(name, torch.bfloat16, bits=bits)
    whole: Any = build_shape(name, torch.bfloat16)
    hf_accel.optimize(whole, [WeightOnlyConfig(bits=bits)], originals="drop")
    assert not any(module.training for module in packed.modules())  # else no layer of it runs natively
    found, expected = tensors_of(packed), tensors_of(whole)
    assert {n: (t.shape, t.dtype, t.device) for n, t in found.items()} == {
        n: (t.shape, t.dtype, t.device) for n, t in expected.items()
    }
    for key, tensor in expected.items():
        if "inv_freq" in key or "norm" in key:
            assert torch.equal(found[key], tensor), key
    assert {n: type(m).__name__ for n, m in packed.named_modules() if n} == {
        n: type(m).__name__ for n, m in whole.named_modules() if n
    }
    assert packed.config.tie_word_embeddings is False
    assert packed.get_output_embeddings().scheme == whole.get_output_embeddings().scheme


def test_each_layer_lies_in_memory_of_its_own() -> None:
    model: Any = build_packed("untied", torch.bfloat16)
    places = [tensor.data_ptr() for tensor in tensors_of(model).values() if tensor.numel()]
    assert len(set(places)) == len(places)
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(experts) == 3
    products = [[*module.gate_up_proj, *module.down_proj] for module in experts]
    for first, second in zip(products[0], products[1], strict=True):  # no two layers are alike
        assert not torch.equal(first.packed.dequantize(), second.packed.dequantize())
        assert torch.equal(first.packed.dequantize().sort(0).values, second.packed.dequantize().sort(0).values)
    assert all(module.config is model.config for module in experts)  # type: ignore[attr-defined]


def test_full_precision_is_made_of_one_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel as Pretrained

    seen: list[str] = []
    initialise = Pretrained._init_weights

    def counting(self: Any, module: Any) -> None:
        seen.append(type(module).__name__)
        initialise(self, module)

    monkeypatch.setattr(Pretrained, "_init_weights", counting)
    build_packed("untied", torch.bfloat16)
    assert seen.count("Qwen3MoeExperts") == 1
    assert seen.count("Qwen3MoeTopKRouter") == 3


@pytest.mark.parametrize("name", TINY)
def test_a_packed_shape_generates_as_it_is_and_optimised(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_packed(name, torch.float32, bits=8)
    assert all(not tensor.is_meta for tensor in tensors_of(model).values())
    stock = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert stock.shape == (1, 17)
    assert model.generation_config.eos_token_id is None  # no token ends the text
    assert torch.isfinite(model(PROMPT).logits).all()
    hf_accel.optimize(model, "exact")
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, do_sample=False), stock)


def test_a_shape_may_have_fewer_layers() -> None:
    assert len(build_packed("untied", torch.bfloat16, layers=1).model.layers) == 1
    assert len(build_shape("untied", torch.bfloat16, layers=2).model.layers) == 2
    assert shape_config("gpt-oss-20b", 3).layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert shape_config("olmoe-1b-7b").num_hidden_layers == 16


@pytest.mark.parametrize("layers", [0, 4, True, 1.0])
def test_layers_that_a_shape_does_not_have(layers: Any) -> None:
    with pytest.raises(ConfigError, match="'untied' has 3 layers; give 1 to 3"):
        build_packed("untied", torch.bfloat16, layers=layers)


def test_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match=r"no shape called 'llama-2b'\. Known: llama-1b"):
        build_packed("llama-2b", torch.bfloat16)
    with pytest.raises(ConfigError, match="bits is 2, 3, 4 or 8; 5 was given"):
        build_packed("untied", torch.bfloat16, bits=5)
    with pytest.raises(ConfigError, match="MXFP4 is for experts, in groups of 32; the shape 'dense' has none"):
        build_packed("dense", torch.bfloat16, bits=None)
    with pytest.raises(ConfigError, match="'untied' has some, and group_size=64 was given"):
        build_packed("untied", torch.bfloat16, bits=None, group_size=64)


def unknown_layout(module: Any) -> None:
    raise ValueError("they lie as nothing else does")


def test_experts_that_would_stay_in_full_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "layout_of", unknown_layout)
    with pytest.raises(UnsupportedModelError, match=r"'untied' cannot be built packed \(.*nothing else.*layers=2"):
        build_packed("untied", torch.bfloat16)


@pytest.mark.parametrize("name", ["clamped", "untied", "tied"])
def test_experts_in_mxfp4_beside_all_else_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_packed(name, torch.bfloat16, bits=None)
    schemes = {id(m): m.scheme.code_book for m in model.modules() if isinstance(m, QuantizedLinear)}
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(experts) == SHAPES[name]["num_hidden_layers"]
    assert set(schemes.values()) == {"fp4"}
    assert len(schemes) == len(experts) * 2 * 4
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied is SHAPES[name]["tie_word_embeddings"]
    weight = experts[0].down_proj[1].packed.dequantize()
    assert 0.5 < weight.std() / model.config.initializer_range < 2
    stock = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    model.to(torch.float32)
    assert torch.isfinite(model(stock).logits).all()


def test_bench_builds_a_packed_shape() -> None:
    options = ("--prompt", "12", "--new", "6", "--rounds", "2", "--threads", "1", "--layers", "2", "--json")
    result = CliRunner().invoke(app, ["bench", "untied", "--bits", "4", "--packed", *options])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    whole = build_shape("untied", torch.bfloat16, layers=2)
    hf_accel.optimize(whole, [WeightOnlyConfig(bits=4)], originals="drop")
    assert data["weight_bytes"] == Anatomy.of(whole).weight_bytes
    assert data["same_ids"] is True
