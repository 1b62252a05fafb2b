"""Heads are read right in every layout, and a model with other heads is an ordinary model of its class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import heads as tiny
import pytest
import torch
from models import NAMES, SMALL, Tiny, build, prompt
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt.modeling_mpt import MptModel

from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.gqa.conversion import reshaped_model, skeleton, with_kv_heads
from hf_accel.gqa.heads import AttentionLayer, Heads, attention_layers, read_heads, write_heads

WITHOUT_HEADS = {"deepseek_v3", "bitnet"}
READ = [name for name in [*NAMES, *tiny.OWN] if name not in WITHOUT_HEADS]
IDS = prompt(2, 9)
FUSED = ["gpt2", "gpt_neox", "phi3", "bigcode", "bigcode_one", "bloom", "mpt", "persimmon", "codegen"]
FUSED += ["falcon_grouped", "falcon_parallel", "falcon_one", "falcon_alibi"]
WHOLE = {"phi3", "falcon_grouped", "falcon_parallel", "falcon_one"}  # numbers of both halves of a head rotate together
FIXED = {"falcon_alibi", "bloom", "mpt", "olmo2", "gpt_oss"}  # something of each query head stands outside projections
# what a model can have instead of the heads it has
EXPRESSIBLE = {name: 4 for name in NAMES if "num_key_value_heads" in build(name).config.to_dict()} | {
    "falcon_grouped": 4,
    "falcon_parallel": 2,
    "falcon_one": 4,
    "bigcode_one": 4,
    "phi": 4,
    "starcoder2": 4,
    "cohere": 4,
    "granite": 4,
    "gpt_oss": 4,
}
for each in WITHOUT_HEADS:
    EXPRESSIBLE.pop(each, None)


def even(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Make what stands beside the projections of each head the same for all heads: slopes, norms and sinks."""
    for owner, name in (
        (modeling_bloom, "_get_alibi_slopes"),
        (modeling_falcon, "build_alibi_tensor"),
        (MptModel, "build_mpt_alibi_tensor"),
    ):
        slopes = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, slopes=slopes, **options: torch.zeros_like(slopes(*args, **options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight", "sinks")):
                parameter.fill_(1)
    return model


def moved(model: PreTrainedModel) -> None:
    """Let heads of each layer change places: the first two groups, and the queries of each group."""
    for layer in attention_layers(model):
        h = read_heads(layer, model.config)
        groups = torch.arange(layer.kv_heads)
        groups[:2] = groups[:2].flip(0)
        queries = torch.arange(layer.heads).view(layer.kv_heads, -1)[groups].flip(1).flatten()

        def at(rows: Any, places: torch.Tensor) -> Any:
            return None if rows is None else rows[places]

        biases = (at(h.q_bias, queries), at(h.k_bias, groups), at(h.v_bias, groups), h.o_bias)
        write_heads(layer, model.config, Heads(h.q[queries], h.k[groups], h.v[groups], h.o[:, queries], *biases))


def emptied(layer: AttentionLayer) -> None:
    with torch.no_grad():
        for name in layer.products:
            for parameter in layer.module.get_submodule(name).parameters():
                parameter.zero_()


@pytest.mark.parametrize("name", READ)
def test_what_was_read_is_written_back(name: str) -> None:
    model = tiny.made(name)
    expected = tiny.logits(model, IDS)
    for layer in attention_layers(model):
        read = read_heads(layer, model.config)
        emptied(layer)
        write_heads(layer, model.config, read)
    assert torch.equal(tiny.logits(model, IDS), expected)


@pytest.mark.parametrize("name", READ)
def test_heads_that_change_places_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = even(tiny.made(name), monkeypatch)
    expected = tiny.logits(model, IDS)
    before = [parameter.clone() for parameter in model.parameters()]
    moved(model)
    torch.testing.assert_close(tiny.logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", READ)
def test_heads_that_have_to_stay_are_named(name: str) -> None:
    model = tiny.made(name)
    assert all(bool(layer.fixed) == (name in FIXED) for layer in attention_layers(model))
    if name in FIXED:
        expected = tiny.logits(model, IDS)
        moved(model)
        assert (tiny.logits(model, IDS) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", READ)
def test_values_of_heads_are_those_of_the_cache(name: str) -> None:
    """The values that a layer caches are its input times the heads read: each head by itself, in its place."""
    model = tiny.made(name)
    for layer in attention_layers(model):
        seen: list[torch.Tensor] = []

        def look(module: nn.Module, args: Any, kwargs: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(kwargs.get("hidden_states", args[0] if args else None))

        handle = layer.module.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            cached = model(IDS, use_cache=True).cache.layers[layer.index].values
        handle.remove()
        h = read_heads(layer, model.config)
        expected = torch.einsum("bse,gde->bgsd", seen[0], h.v)
        if h.v_bias is not None:
            expected += h.v_bias[None, :, None]
        if len(h.v) != cached.shape[1]:  # falcon caches the value of a group once for each of its queries
            expected = expected.repeat_interleave(cached.shape[1] // len(h.v), 1)
        torch.testing.assert_close(cached, expected[:, :, -cached.shape[2] :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_numbers_of_a_query_meet_those_of_its_key(name: str) -> None:
    """A number of the queries twice as large and the same number of the keys half as large change nothing."""
    model = tiny.made(name)
    expected = tiny.logits(model, IDS)
    for layer in attention_layers(model):
        h = read_heads(layer, model.config)
        factors = torch.ones(h.q.shape[1])
        factors[[len(factors) // 2 - 1, -1] if name in WHOLE else [-1]] = 2
        q_bias, k_bias = (None, None) if h.q_bias is None else (h.q_bias * factors, h.k_bias / factors)
        q, k = h.q * factors[:, None], h.k / factors[:, None]
        write_heads(layer, model.config, replace(h, q=q, k=k, q_bias=q_bias, k_bias=k_bias))
    torch.testing.assert_close(tiny.logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_more_heads_and_then_fewer(name: str, tmp_path: Path) -> None:
    """Repeated heads compute the same, and so do those picked of them again; what has fewer is an ordinary model."""
    model = tiny.made(name)
    own, more = attention_layers(model)[0].kv_heads, EXPRESSIBLE[name]
    expected, before = tiny.logits(model, IDS), {n: p.clone() for n, p in model.named_parameters()}
    if more >= own:
        wide = tiny.converted(model, more)
        torch.testing.assert_close(tiny.logits(wide, IDS), expected, rtol=1e-4, atol=1e-4)
        back = tiny.converted(wide, own)
        torch.testing.assert_close(tiny.logits(back, IDS), expected, rtol=1e-4, atol=1e-4)
    few = tiny.converted(model, min(own, 2) if own == 4 else 1)
    few.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(few, IDS), tiny.logits(reloaded, IDS))
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(few.generate(IDS, **greedy), reloaded.generate(IDS, **greedy))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(tiny.logits(model, IDS), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "falcon_grouped"])
def test_what_is_shared(name: str) -> None:
    model = tiny.made(name)
    own = tiny.storages(model)
    layers = attention_layers(model)
    alone = tiny.converted(model, 1, shares=False)
    assert not own & tiny.storages(alone)
    few = tiny.converted(model, 1, shares=True)
    fresh = {n for n, p in few.named_parameters() if p.untyped_storage().data_ptr() not in own}
    products = tuple(f"{layer.path}.{product}" for layer in layers for product in layer.products)
    assert fresh
    assert all(n.startswith(products) and not n.endswith(("o_proj.weight", "dense.weight")) for n in fresh)
    same = tiny.converted(model, layers[0].kv_heads, shares=True)
    assert tiny.storages(same) == own
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (few.get_input_embeddings().weight is few.get_output_embeddings().weight) == tied
    assert (alone.get_input_embeddings().weight is alone.get_output_embeddings().weight) == tied


def test_what_is_carried_over() -> None:
    model = build("llama", torch.bfloat16, attention="eager").train()
    model.model.norm.float()
    model.generation_config.top_k = 3
    few = tiny.converted(model, 1)
    assert (few.config._attn_implementation, few.generation_config.top_k, few.training) == ("eager", 3, False)
    assert few.generation_config is not model.generation_config
    assert model.training
    assert {n: p.dtype for n, p in few.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert few.config.num_key_value_heads == 1
    assert model.config.num_key_value_heads == 2
    assert all(module.config is few.config for module in few.modules() if hasattr(module, "config"))
    for (_, old), (_, new) in zip(model.named_buffers(), few.named_buffers(), strict=True):
        assert torch.equal(old, new)
        assert old is not new


def test_a_skeleton_has_no_memory() -> None:
    model = build("llama")
    bones = skeleton(model, with_kv_heads(model.config, 1))
    assert type(bones) is type(model)
    assert all(parameter.is_meta for parameter in bones.parameters())
    assert bones.model.layers[0].self_attn.k_proj.weight.shape == (10, 52)


GATED = {"head_dim": 16, "layer_types": ["full_attention"] * 2, "num_experts": 2}
REFUSED: dict[str, tuple[Any, str]] = {
    "latent attention": (
        lambda: build("deepseek_v3"),
        r"layers\.0\.self_attn is a DeepseekV3Attention: its keys and values come from one latent",
    ),
    "gated queries": (lambda: tiny.model_of(Tiny("qwen3_next", SMALL | GATED)), "q_proj has 128 rows for 4 heads"),
    "differences of heads": (lambda: tiny.model_of(Tiny("diffllama", SMALL)), "lambda_q1"),
    "another sequence": (
        lambda: tiny.model_of(Tiny("gpt2", {"n_embd": 8, "n_head": 2, "n_layer": 1, "add_cross_attention": True})),
        "crossattention",
    ),
    "attention of no layer": (lambda: nn.Linear(2, 2), "transformers models"),
    "no attention": (
        lambda: tiny.model_of(Tiny("mamba", {"hidden_size": 16, "num_hidden_layers": 1})),
        "no self-attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read(name: str) -> None:
    model, words = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=words):
        attention_layers(model())


def test_an_order_of_rows_that_is_not_known() -> None:
    model = build("gpt_neox")

    class OtherAttention(nn.Module):
        pass

    attention = model.gpt_neox.layers[1].attention
    attention.__class__ = OtherAttention
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.attention is a OtherAttention: its parts are dense"):
        attention_layers(model)


def test_a_product_that_is_none() -> None:
    model = build("llama")
    attention = model.model.layers[0].self_attn

    class Adapter(nn.Linear):
        pass

    attention.k_proj.__class__ = Adapter
    with pytest.raises(UnsupportedModelError, match=r"its k_proj is a .*Adapter, not a plain product"):
        attention_layers(model)


@pytest.mark.parametrize(
    "name, kv_heads, error, words",
    [
        ("llama", 3, ConfigError, "divide 4"),
        ("llama", 0, ConfigError, "divide 4"),
        ("gpt2", 1, UnsupportedModelError, "gpt_bigcode"),
        ("gpt_neox", 2, UnsupportedModelError, "phi or starcoder2 or nemotron"),
        ("bloom", 1, UnsupportedModelError, "divides the slopes"),
        ("mpt", 1, UnsupportedModelError, "divides the slopes"),
        ("olmo2", 1, UnsupportedModelError, r"k_norm\.weight"),
        ("bigcode", 2, UnsupportedModelError, "one, or as many as query heads, 4"),
        ("falcon_alibi", 2, UnsupportedModelError, "one, or as many as query heads, 4"),
    ],
)
def test_numbers_of_heads_that_cannot_be(name: str, kv_heads: int, error: type[Exception], words: str) -> None:
    model = tiny.made(name)
    with pytest.raises(error, match=words):
        with_kv_heads(model.config, kv_heads)
    with pytest.raises(error, match=words):
        reshaped_model(model, kv_heads, shares=True)


def test_norms_of_single_heads_are_not_converted() -> None:
    model = tiny.model_of(Tiny("stablelm", SMALL | {"hidden_size": 64, "qk_layernorm": True}))
    with pytest.raises(UnsupportedModelError, match=r"k_layernorm\.norms"):
        with_kv_heads(model.config, 1)


def test_heads_that_do_not_fit() -> None:
    model = tiny.made("stablelm")
    layer = attention_layers(model)[0]
    read, before = read_heads(layer, model.config), [p.clone() for p in layer.module.parameters()]
    for wrong in (
        replace(read, k=read.k[:1]),
        replace(read, o=read.o[:, :2]),
        replace(read, o_bias=torch.zeros(48)),
        replace(read, k_bias=read.q_bias),
    ):
        with pytest.raises(ConfigError, match="self_attn"):
            write_heads(layer, model.config, replace(wrong, q=2 * read.q))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.module.parameters(), strict=True))
