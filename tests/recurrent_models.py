"""Tiny models with recurrent mixers of every kind, by what tells the kinds' readings apart."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from models import COMMON, PAD, SMALL, Tiny, randomize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HYBRID: dict[str, Any] = SMALL | {"num_hidden_layers": 3, "head_dim": 16}
# two value heads for each key head; sizes that vectors do not divide
DELTA: dict[str, Any] = HYBRID | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 19,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 20, "mamba_n_groups": 2}

RECURRENT: dict[str, Tiny] = {
    # projections of several parts, head after head; a mixture beside it
    "qwen3_next": Tiny(
        "qwen3_next",
        DELTA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "qwen3_5": Tiny("qwen3_5_text", DELTA),
    # beta up to two, and six projections
    "olmo_hybrid": Tiny("olmo_hybrid", DELTA | {"linear_allow_neg_eigval": True}),
    "granite": Tiny(
        "granitemoehybrid",
        HYBRID
        | MAMBA2
        | {"num_local_experts": 0, "shared_intermediate_size": 72, "layer_types": ["mamba", "attention", "mamba"]},
    ),
    # multipliers, and a gate without a norm
    "falcon_h1": Tiny(
        "falcon_h1",
        HYBRID
        | MAMBA2
        | {
            "mamba_d_ssm": 96,
            "mamba_rms_norm": False,
            "ssm_in_multiplier": 1.5,
            "ssm_multipliers": [0.5, 0.75, 1.25, 1.5, 0.8],
        },
    ),
    "mamba2": Tiny(
        "mamba2",
        COMMON
        | {"hidden_size": 48, "num_heads": 6, "head_dim": 16, "state_size": 20, "n_groups": 2, "num_hidden_layers": 2},
    ),
    "mamba": Tiny("mamba", COMMON | {"hidden_size": 48, "state_size": 19, "num_hidden_layers": 2}),
    # norms of time steps, B and C
    "jamba": Tiny(
        "jamba",
        SMALL
        | {
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
        },
    ),
    "lfm2": Tiny("lfm2", HYBRID | {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}),
    # a decay of each key, and a gate of low rank
    "kimi_linear": Tiny(
        "kimi_linear",
        HYBRID
        | {
            "linear_num_heads": 4,
            "linear_head_dim": 12,
            "num_key_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
}
NAMES = list(RECURRENT)
FEW = ["qwen3_next", "granite", "jamba", "lfm2"]  # one of each kind


@functools.cache
def _prototype(name: str, dtype: torch.dtype) -> PreTrainedModel:
    tiny = RECURRENT[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **tiny.config))
    randomize(model, tiny)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def recurrent(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a fresh model; two calls return equal models that share nothing."""
    return copy.deepcopy(_prototype(name, dtype))
