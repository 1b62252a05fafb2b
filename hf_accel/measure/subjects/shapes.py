"""Models of named shapes with random weights: they show speed, never quality."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_accel.errors import ConfigError

# the published configurations of Llama-3.2-1B, SmolLM-135M and Llama-3.1-8B, and of the mixtures of experts
# granite-3.1-1b-a400m, OLMoE-1B-7B, Qwen3-30B-A3B and gpt-oss-20b
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
                     max_position_embeddings=8192, tie_word_embeddings=True),
    "smollm-135m": dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, head_dim=64, vocab_size=49152,
                        max_position_embeddings=8192, tie_word_embeddings=True),
    "llama-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
                     max_position_embeddings=8192, tie_word_embeddings=False),
    "granite-1b-a400m": dict(model_type="granitemoe", hidden_size=1024, intermediate_size=512, num_hidden_layers=24,
                             num_attention_heads=16, num_key_value_heads=8, vocab_size=49155, num_local_experts=32,
                             num_experts_per_tok=8, embedding_multiplier=12.0, residual_multiplier=0.22,
                             attention_multiplier=0.015625, logits_scaling=6.0, rms_norm_eps=1e-6,
                             max_position_embeddings=131072, tie_word_embeddings=True,
                             rope_parameters={"rope_type": "default", "rope_theta": 1.5e6}),
    "olmoe-1b-7b": dict(model_type="olmoe", hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
                        num_attention_heads=16, num_key_value_heads=16, vocab_size=50304, num_experts=64,
                        num_experts_per_tok=8, norm_topk_prob=False, rms_norm_eps=1e-5, max_position_embeddings=4096,
                        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
                          num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                          vocab_size=151936, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
                          rms_norm_eps=1e-6, max_position_embeddings=40960, tie_word_embeddings=False,
                          rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "gpt-oss-20b": dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
                        num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
                        num_local_experts=32, num_experts_per_tok=4, sliding_window=128, rms_norm_eps=1e-5,
                        max_position_embeddings=131072, tie_word_embeddings=False,
                        rope_parameters={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0,
                                         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                                         "original_max_position_embeddings": 4096}),
}  # fmt: skip


def shape_config(name: str, layers: int | None = None) -> Any:
    """Return the transformers config of a named shape.

    layers: how many decoder layers it has instead of its own number; what a token costs beside them stays.

    Raises:
        ConfigError: there is no shape of that name, or it does not have so many layers.
    """
    if name not in SHAPES:
        raise ConfigError(f"There is no shape called {name!r}. Known: {', '.join(SHAPES)}.")
    shape = dict(SHAPES[name])
    most = shape["num_hidden_layers"]
    if layers is not None:
        if type(layers) is not int or not 1 <= layers <= most:
            raise ConfigError(f"The shape {name!r} has {most} layers; give 1 to {most} of them, not {layers!r}.")
        shape["num_hidden_layers"] = layers
    return AutoConfig.for_model(**shape)


def build_shape(name: str, dtype: torch.dtype, device: str = "cpu", *, layers: int | None = None) -> PreTrainedModel:
    """Return a model of a named shape with random weights, built in `dtype` (no second copy in memory).

    Raises:
        ConfigError: as `shape_config`.
    """
    config = shape_config(name, layers)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return without_end(model.eval())


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model` changed so that no token ends its text: random weights may write any at any time."""
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    return model
