"""Tiny mixtures of experts of the architectures that route and lay out their experts in ways of their own."""

from __future__ import annotations

import copy
import functools
from typing import Any

from heads import model_of
from models import EXPERTS, PAD, SMALL, TINY, Tiny
from transformers import PreTrainedModel

_LATENT: dict[str, Any] = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
_GROUPS: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_MULTIPLIERS: dict[str, Any] = {
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "logits_scaling": 1.5,
}
_TWO_OF_FOUR: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

MIXTURES: dict[str, Tiny] = {
    "mixtral": TINY["mixtral"],
    "qwen3_moe": TINY["qwen3_moe"],
    "deepseek_v3": TINY["deepseek_v3"],
    "qwen2_moe": Tiny("qwen2_moe", SMALL | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40}),
    # its first layer is a dense one
    "qwen3_moe_mixed": Tiny("qwen3_moe", TINY["qwen3_moe"].config | {"mlp_only_layers": [0]}),
    "olmoe": Tiny("olmoe", SMALL | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": Tiny("granitemoe", SMALL | _TWO_OF_FOUR | _MULTIPLIERS, embedding=0.3),
    "gpt_oss": Tiny("gpt_oss", SMALL | _TWO_OF_FOUR | {"head_dim": 16}),
    "deepseek_v2": Tiny("deepseek_v2", SMALL | EXPERTS | _LATENT | _GROUPS | {"q_lora_rank": None, "v_head_dim": 16}),
    "ernie4_5_moe": Tiny("ernie4_5_moe", SMALL | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 40}),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        SMALL | EXPERTS | {"num_experts": 4, "layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    ),
    "aria": Tiny("aria_text", SMALL),
    "llama4": Tiny(
        "llama4_text",
        SMALL | {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 72},
    ),
}
UNREGISTERED = "llama4"  # its experts take the tokens of all experts at once, and no registry is asked
LAYERED = ["mixtral", "qwen3_moe", "qwen3_moe_mixed", "qwen2_moe", "olmoe", "granitemoe"]  # described as layers, too


@functools.cache
def _prototype(name: str) -> PreTrainedModel:
    model = model_of(MIXTURES[name])
    model.generation_config.pad_token_id = PAD
    return model


def mixture(name: str) -> PreTrainedModel:
    """Return a fresh model in fp32."""
    return copy.deepcopy(_prototype(name))
