"""How architectures spell their layers: the table that grows.

A table entry that a new transformers release makes wrong costs speed, never correctness: patchers check by running that
a description holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Style:
    """How one architecture spells a pre-norm gated decoder layer.

    feed_forward: the name of the child that follows attention; mixture: it may be another module than gate, up and
    down, as one with experts, which runs by itself then. residual_scale: the name of the layer's factor for what its
    parts add to the residual.
    """

    layer_class: str
    norm_style: Literal["llama", "gemma"] = "llama"
    norm_eps: str = "variance_epsilon"
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qk_norm: Literal["head", "row"] | None = None
    sandwich_norms: bool = False
    softcap: bool = False
    activation: str = "hidden_act"
    feed_forward: str = "mlp"
    mixture: bool = False
    residual_scale: str | None = None


STYLES = {
    "llama": Style("LlamaDecoderLayer"),
    "mistral": Style("MistralDecoderLayer"),
    "qwen2": Style("Qwen2DecoderLayer"),
    "qwen3": Style("Qwen3DecoderLayer", qk_norm="head"),
    "granite": Style("GraniteDecoderLayer", residual_scale="residual_multiplier"),
    "mixtral": Style("MixtralDecoderLayer", mixture=True),
    "qwen2_moe": Style("Qwen2MoeDecoderLayer", mixture=True),
    "qwen3_moe": Style("Qwen3MoeDecoderLayer", mixture=True, qk_norm="head"),
    "olmoe": Style("OlmoeDecoderLayer", mixture=True, qk_norm="row"),
    "granitemoe": Style(
        "GraniteMoeDecoderLayer", feed_forward="block_sparse_moe", mixture=True, residual_scale="residual_multiplier"
    ),
    "phi3": Style("Phi3DecoderLayer", fused_qkv=True, fused_gate_up=True),
    "gemma2": Style(
        "Gemma2DecoderLayer",
        norm_style="gemma",
        norm_eps="eps",
        sandwich_norms=True,
        softcap=True,
        activation="hidden_activation",
    ),
    "gemma3_text": Style(
        "Gemma3DecoderLayer",
        norm_style="gemma",
        norm_eps="eps",
        qk_norm="head",
        sandwich_norms=True,
        activation="hidden_activation",
    ),
}


SIBLING_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
