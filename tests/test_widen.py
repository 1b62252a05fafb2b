"""A widened model writes what the original writes, whatever grows, and has the weights of a model of its shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import PAD, Tiny, build, padded, prompt, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

import hf_accel
from hf_accel.assets import demo_path
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.measure.subjects.widen import LLAMA_1B_COST, widen

NARROW: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 67,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-3,  # of a size that shows: a twentieth of an embedding's mean square
    "pad_token_id": PAD,
    "eos_token_id": None,
}
WIDE = {"hidden_size": 120, "intermediate_size": 150, "num_hidden_layers": 5, "num_attention_heads": 15}


def tiny(**changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**NARROW | changes)).eval()
    randomize(model, Tiny("llama", {}, embedding=0.15))
    return model


def greedy(model: Any, **inputs: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=PAD)


@torch.no_grad()
def assert_same_function(model: Any, wide: Any) -> None:
    ids = prompt(2, 17).to(model.device)
    expected, found = model(ids).logits, wide(ids).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    inputs = padded([11, 5])
    for use_cache in (True, False):
        text = greedy(model, **inputs, use_cache=use_cache)
        assert text[:, 11:].unique().numel() > 8, "the text hardly varies, so little is compared"
        assert torch.equal(greedy(wide, **inputs, use_cache=use_cache), text)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_everything_wider_is_the_same_function(dtype: torch.dtype, tied: bool, biased: bool) -> None:
    model = tiny(tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased).to(dtype)
    wide = widen(model, WIDE, dtype)
    assert_same_function(model, wide)
    assert {parameter.dtype for parameter in wide.parameters()} == {dtype}
    assert (wide.lm_head.weight is wide.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("key", WIDE)
def test_one_size_wider_is_the_same_function(key: str) -> None:
    model = tiny(hidden_size=60)
    assert_same_function(model, widen(model, {"num_attention_heads": 6} | {key: WIDE[key]}, torch.float32))


@pytest.mark.parametrize(
    ("heads", "key_heads"),
    [(12, 2), (12, 3), (20, 5), (12, 4), (8, 4), (12, 6), (6, 6), (12, 12)],
    ids=str,
)
def test_other_groups_of_heads_are_the_same_function(heads: int, key_heads: int) -> None:
    """Original heads read 3 per key/value head; here 6, 4, 4, 3, 2, 2, 1 and 1."""
    model = tiny()
    shape = {"hidden_size": 120, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    wide = widen(model, shape, torch.float32)
    assert (wide.config.num_attention_heads, wide.config.num_key_value_heads) == (heads, key_heads)
    assert_same_function(model, wide)


def test_the_weights_are_those_of_the_shape() -> None:
    wide = widen(tiny(), WIDE, torch.bfloat16)
    plain = LlamaForCausalLM(LlamaConfig(**NARROW | WIDE | {"num_key_value_heads": 5}))
    assert {n: p.shape for n, p in wide.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert {p.dtype for p in wide.parameters()} == {torch.bfloat16}
    assert not wide.training
    assert all(p.requires_grad for p in wide.parameters())


def test_heads_fill_the_hidden_size_and_groups_stay() -> None:
    wide = widen(tiny(), {"hidden_size": 120}, torch.float32)
    assert (wide.config.num_attention_heads, wide.config.num_key_value_heads, wide.config.head_dim) == (12, 4, 10)


def test_original_heads_come_first_where_groups_stay() -> None:
    model = tiny()
    layer, old = widen(model, WIDE, torch.float32).model.layers[0].self_attn, model.model.layers[0].self_attn
    for wide, narrow in ((layer.q_proj, old.q_proj), (layer.k_proj, old.k_proj), (layer.v_proj, old.v_proj)):
        rows, columns = narrow.weight.shape
        assert torch.equal(wide.weight[:rows, :columns], narrow.weight)
        assert wide.weight[rows:].count_nonzero() == wide.weight[:, columns:].count_nonzero() == 0


def test_added_layers_compute_but_add_nothing() -> None:
    layer = widen(tiny(), WIDE, torch.float32).model.layers[-1]
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.self_attn.o_proj.weight.count_nonzero() == layer.mlp.down_proj.weight.count_nonzero() == 0


def test_two_calls_give_equal_models() -> None:
    model = tiny()
    first = widen(model, WIDE, torch.float32)
    torch.manual_seed(5)
    second = widen(model, WIDE, torch.float32)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_original_is_left_alone() -> None:
    model = tiny()
    model.generation_config.eos_token_id = 9
    before = copy.deepcopy(model)
    wide = widen(model, WIDE, torch.float32)
    assert wide.generation_config.eos_token_id == 9
    assert wide.generation_config is not model.generation_config
    assert model.config.to_dict() == before.config.to_dict()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.fill_(7)
    for one, two in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.get_default_dtype() == torch.float32


def test_a_wide_model_can_be_optimised() -> None:
    model = tiny()
    wide = widen(model, WIDE, torch.float32)
    expected = greedy(model, input_ids=prompt())
    hf_accel.optimize(wide)
    assert torch.equal(greedy(wide, input_ids=prompt()), expected)


@pytest.mark.parametrize("text", ["def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n"])
def test_the_trained_model_writes_the_same_text(text: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32, local_files_only=True).eval()
    inputs = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)(text, return_tensors="pt")
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7}
    wide: Any = widen(model, shape, torch.float32)

    def write(of: Any) -> torch.Tensor:
        return of.generate(inputs["input_ids"], max_new_tokens=100, do_sample=False)

    expected = write(model)
    assert expected.shape[1] > 60
    assert torch.equal(write(wide), expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 40}, "hidden_size 40 is narrower than the model's 48"),
        ({"intermediate_size": 66}, "intermediate_size 66 is narrower than the model's 67"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 is narrower than the model's 2"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is narrower than the model's 6"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1 is narrower than the model's 2"),
        ({"num_attention_heads": 8}, "8 heads do not divide into groups of 3"),
        ({"num_key_value_heads": 4}, "do not fit together"),
        ({"hidden_size": 50, "num_attention_heads": 6}, "do not fit together"),
        ({"num_key_value_heads": 3}, "Give at least 4 key/value heads"),
        ({"vocab_size": 200}, "no 'vocab_size'.*Known: hidden_size"),
    ],
)
def test_shapes_that_do_not_fit(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        widen(tiny(), shape, torch.float32)


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"torch.int8.*torch.bfloat16"):
        widen(tiny(), WIDE, torch.int8)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_other_architectures_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"was asked for (Qwen2For|GPT2LM)\w+.*Give a Llama"):
        widen(build(name), LLAMA_1B_COST, torch.float32)


def test_a_llama_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel.*Give a Llama"):
        widen(LlamaModel(LlamaConfig(**NARROW)), WIDE, torch.float32)


def test_a_model_with_other_weights_is_refused() -> None:
    model = tiny()
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj.*restore"):
        widen(model, WIDE, torch.float32)
