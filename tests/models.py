"""Tiny random models on which a mistake shows: wide weights, so that every token depends on its context.

At the usual initializer range of 0.02 a tiny model's next token hardly depends on what came before it, and a test that
drops the attention mask passes. Here weights have a range of 0.25 to 0.35, norms and biases are random, too.
`test_models.py` proves of every model that its text depends on each prompt token, on the mask and on positions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
EOS = 7  # not an end of text unless a test says so
PAD = 0

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = COMMON | {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}


@dataclass(frozen=True)
class Tiny:
    """One architecture: its transformers model type and the arguments of its config."""

    model_type: str
    config: dict[str, Any]
    scale: float = 0.25
    embedding: float = 1.0  # of token embeddings: small where they are tied to the head, or multiplied by the model
    keyword: str | None = None  # a further argument of the model's forward that changes its output


TINY: dict[str, Tiny] = {
    # head size 10 and inner size 67: no multiple of any vector width
    "llama": Tiny(
        "llama", SMALL | {"hidden_size": 52, "head_dim": 10, "intermediate_size": 67, "num_hidden_layers": 3}
    ),
    "mistral": Tiny("mistral", SMALL | {"sliding_window": 8, "head_dim": 16}),
    "qwen2": Tiny("qwen2", SMALL | {"tie_word_embeddings": True}, 0.35, 0.1),
    "qwen3": Tiny("qwen3", SMALL | {"head_dim": 16}),
    "gemma2": Tiny(
        "gemma2",
        SMALL
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        embedding=0.2,
    ),
    "gemma3": Tiny(
        "gemma3_text",
        SMALL
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        embedding=0.2,
    ),
    "phi3": Tiny("phi3", SMALL | {"original_max_position_embeddings": 512}),
    "gpt2": Tiny(
        "gpt2", COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}, 0.35, keyword="token_type_ids"
    ),
    "opt": Tiny(
        "opt",
        COMMON
        | {
            "hidden_size": 48,
            "ffn_dim": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 48,
        },
        0.35,
    ),
    "gpt_neox": Tiny("gpt_neox", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "mixtral": Tiny("mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": Tiny("qwen3_moe", SMALL | EXPERTS | {"num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1}),
    "deepseek_v3": Tiny(
        "deepseek_v3",
        SMALL
        | EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    "stablelm": Tiny("stablelm", SMALL | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    # no layer of BitNet is understood: a norm lies between attention and its output product
    "bitnet": Tiny("bitnet", SMALL),
}
NAMES = list(TINY)
UNDESCRIBED = "bitnet"
# one of each kind that our paths tell apart: native layers, windows, fused, biases, learned positions
FEW = ["llama", "gemma3", "qwen2", "gpt2"]


@functools.cache
def _prototype(name: str, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    tiny = TINY[name]
    config = AutoConfig.for_model(tiny.model_type, **tiny.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    randomize(model, tiny)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def randomize(model: PreTrainedModel, tiny: Tiny, seed: int = 1) -> None:
    """Fill every parameter: matrices with the standard deviation `tiny` names, norms and biases around 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (tiny.embedding if "embed" in name or ".wte." in name else tiny.scale))
            elif name.endswith("weight"):
                parameter.copy_((1 if bool((parameter == 1).all()) else 0) + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def build(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """Return a fresh model; two calls with the same arguments return equal models that share nothing."""
    return copy.deepcopy(_prototype(name, dtype, attention))


@functools.cache
def stock(name: str) -> PreTrainedModel:
    """Return the model that tests share: to be asked, not to be changed."""
    return build(name)


def on_models(cases: Iterable[str], everywhere: Iterable[str]) -> list[Any]:
    """Return parameters (case, model): every case on FEW, those of `everywhere` on all models; the rest are slow."""
    hard = set(everywhere)
    cases = list(cases)
    assert hard <= set(cases)
    return [
        pytest.param(case, name, marks=[] if name in FEW or case in hard else pytest.mark.slow)
        for name in NAMES
        for case in cases
    ]


def prompt(batch: int = 1, tokens: int = 11, seed: int = 3) -> torch.Tensor:
    """Return random token ids [batch, tokens] without the ids of padding, start and end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, VOCABULARY, (batch, tokens), generator=generator)


def padded(lengths: list[int], seed: int = 3) -> dict[str, torch.Tensor]:
    """Return left-padded ids and mask [len(lengths), max(lengths)]."""
    ids = prompt(len(lengths), max(lengths), seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}
