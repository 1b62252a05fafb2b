"""Tiny models of the architectures that spell heads in their own ways, and models made of them with other heads."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from models import COMMON, PAD, SMALL, Tiny, build, randomize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_accel.gqa.conversion import reshaped_model, share_equal
from hf_accel.gqa.heads import Heads, attention_layers, layers_of, read_heads, write_heads

_FALCON = COMMON | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 72}
_FALCON |= {"bias": True, "tie_word_embeddings": True}
_GPT = COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"hidden_size": 64}

OWN: dict[str, Tiny] = {
    "falcon_grouped": Tiny("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, embedding=0.2),
    "falcon_parallel": Tiny("falcon", _FALCON | {"multi_query": False}, embedding=0.2),
    "falcon_one": Tiny("falcon", _FALCON, embedding=0.2),
    "falcon_alibi": Tiny("falcon", _FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True}),
    "bloom": Tiny("bloom", COMMON | {"hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "mpt": Tiny("mpt", COMMON | {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "bigcode_one": Tiny("gpt_bigcode", _GPT | {"multi_query": True}),
    "bigcode": Tiny("gpt_bigcode", _GPT | {"multi_query": False}),
    "phi": Tiny("phi", SMALL | {"hidden_size": 64, "qk_layernorm": True}),
    "starcoder2": Tiny("starcoder2", SMALL),
    "cohere": Tiny("cohere", SMALL),
    "olmo2": Tiny("olmo2", SMALL),
    "granite": Tiny("granite", SMALL),
    "gpt_oss": Tiny("gpt_oss", SMALL | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "persimmon": Tiny("persimmon", _NEOX | {"qk_layernorm": False}),
    "gptj": Tiny("gptj", _GPT | {"rotary_dim": 8}),
    "codegen": Tiny("codegen", _GPT | {"rotary_dim": 8, "n_ctx": 64}),
    "neox_parallel": Tiny("gpt_neox", _NEOX),
    "neox_sequential": Tiny("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "neox_whole": Tiny("gpt_neox", _NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "gpt2_scaled": Tiny("gpt2", _GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "opt_bare": Tiny(
        "opt",
        COMMON
        | {"hidden_size": 48, "ffn_dim": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "enable_bias": False, "layer_norm_elementwise_affine": False},
        0.35,
    ),
}


@functools.cache
def _prototype(name: str) -> PreTrainedModel:
    if name not in OWN:
        return build(name)
    model = model_of(OWN[name])
    model.generation_config.pad_token_id = PAD
    return model


def model_of(tiny: Tiny) -> PreTrainedModel:
    """Return a model of an architecture with random weights."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **tiny.config))
    randomize(model, tiny)
    return model.eval()


def made(name: str) -> PreTrainedModel:
    """Return a fresh model of `models.TINY` or of those here."""
    return copy.deepcopy(_prototype(name))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def picked(model: PreTrainedModel, kv_heads: int) -> list[Heads]:
    """Return the heads of all layers with `kv_heads` key/value heads: each repeated, or the first of each group."""

    def pick(rows: Any) -> Any:
        if rows is None or len(rows) == kv_heads:
            return rows
        return (
            rows.repeat_interleave(kv_heads // len(rows), 0) if kv_heads > len(rows) else rows[:: len(rows) // kv_heads]
        )

    found = [read_heads(layer, model.config) for layer in attention_layers(model)]
    return [Heads(h.q, pick(h.k), pick(h.v), h.o, h.q_bias, pick(h.k_bias), pick(h.v_bias), h.o_bias) for h in found]


def with_heads(model: PreTrainedModel, kv_heads: int, heads: list[Heads], shares: bool = True) -> PreTrainedModel:
    """Return a new model like `model` with these heads, layer by layer."""
    new: PreTrainedModel = reshaped_model(model, kv_heads, shares=shares)
    for layer, own in zip(layers_of(new), heads, strict=True):
        write_heads(layer, new.config, own)
    if shares:
        share_equal(new, model)
    return new


def converted(model: PreTrainedModel, kv_heads: int, shares: bool = True) -> PreTrainedModel:
    """Return a model with the heads that `picked` returns."""
    return with_heads(model, kv_heads, picked(model, kv_heads), shares)


def storages(model: PreTrainedModel) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
