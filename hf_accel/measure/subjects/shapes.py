"""Llama models of named shapes with random weights: they show speed, never quality."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_accel.errors import ConfigError

# the published configurations of Llama-3.2-1B, SmolLM-135M and Llama-3.1-8B
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "smollm-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                        num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip


def build_shape(name: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Return a Llama model of a named shape with random weights, built in `dtype` (no second copy in memory).

    Raises:
        ConfigError: there is no shape of that name.
    """
    if name not in SHAPES:
        raise ConfigError(f"There is no shape called {name!r}. Known: {', '.join(SHAPES)}.")
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    return model
