"""Tiny mixtures of experts of every layout and gate: the models of `models.TINY` and more, by name."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from models import EXPERTS, PAD, SMALL, TINY, Tiny, randomize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_CHOSEN = {"num_experts_per_tok": 2}
_MLA = {k: v for k, v in TINY["deepseek_v3"].config.items() if k not in SMALL}

MIXTURES: dict[str, Tiny] = {
    **{name: TINY[name] for name in ("mixtral", "qwen3_moe", "deepseek_v3")},
    "qwen2_moe": Tiny(
        "qwen2_moe",
        SMALL | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    ),
    "olmoe": Tiny("olmoe", SMALL | _CHOSEN | {"num_experts": 4}),
    "granitemoe": Tiny("granitemoe", SMALL | _CHOSEN | {"num_local_experts": 4}),
    # hidden and inner sizes differ, so that a weight that is not turned does not fit
    "gpt_oss": Tiny("gpt_oss", SMALL | _CHOSEN | {"head_dim": 16, "num_local_experts": 4}),
    "deepseek_v2": Tiny("deepseek_v2", SMALL | EXPERTS | _MLA | {"num_key_value_heads": 4, "topk_method": "greedy"}),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe", SMALL | EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    ),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        SMALL | EXPERTS | {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "aria_text": Tiny("aria_text", SMALL | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
}


@functools.cache
def _prototype(name: str, dtype: torch.dtype) -> PreTrainedModel:
    tiny = MIXTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **tiny.config))
    randomize(model, tiny)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    for parameter in model.parameters():  # buffers of rotary embeddings stay as a loader makes them
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def mixture(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a fresh model; two calls with the same arguments return equal models that share nothing."""
    return copy.deepcopy(_prototype(name, dtype))


def experts_of(model: Any) -> dict[str, Any]:
    """Return path -> module of experts, packed or not."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "gate_up_proj")
            and type(module).__name__.endswith("Experts")}  # fmt: skip


def routing(experts: int, tokens: int = 13, choices: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and weights [tokens, choices], the ids of a token all different."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    return ids, torch.rand(tokens, choices, generator=generator)
