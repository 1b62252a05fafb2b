"""gpt_neox whose MLP stands after attention, as starcoder2 where whole heads rotate and as nemotron where parts do."""

from __future__ import annotations

import copy
from typing import Any

from hf_accel.gqa.architectures.building import Tensors, built, check_rotation, config_for, heads_of, refuse, renamed


def to_starcoder2(model: Any) -> Any:
    """Return a sequential GPT-NeoX model as starcoder2; all but attention is shared.

    Raises:
        UnsupportedModelError: its MLP stands beside attention, or only a part of each head rotates.
    """
    config = model.config
    _check_sequential(model, "starcoder2")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(model, "starcoder2", "only a part of each head rotates (rotary_pct)")
    new = config_for(
        model,
        "starcoder2",
        **_common(config),
        norm_epsilon=config.layer_norm_eps,
        residual_dropout=config.hidden_dropout,
        embedding_dropout=config.hidden_dropout,
        use_bias=True,
        sliding_window=None,
    )
    return built(model, new, _tensors(model, "mlp.c_fc", "mlp.c_proj"), heads_of(model))


def to_nemotron(model: Any) -> Any:
    """Return a sequential GPT-NeoX model as nemotron; all but attention and the weights of norms is shared.

    Nemotron keeps the weight of a norm as its distance from one. It has no dropout on what layers write, which
    matters for training only.

    Raises:
        UnsupportedModelError: its MLP stands beside attention, or an odd number of a head's numbers rotates.
    """
    config = model.config
    _check_sequential(model, "nemotron")
    check_rotation(model, "nemotron")
    size = config.hidden_size // config.num_attention_heads
    own = {"norm_eps": config.layer_norm_eps, "attention_bias": True, "mlp_bias": True, "head_dim": size}
    new = config_for(model, "nemotron", **_common(config), **own)
    tensors = _tensors(model, "mlp.up_proj", "mlp.down_proj")
    for name, tensor in tensors.items():
        if "norm." in name and name.endswith(".weight"):
            tensors[name] = (tensor.detach().double() - 1).to(tensor)
    return built(model, new, tensors, heads_of(model))


def _check_sequential(model: Any, target: str) -> None:
    if model.config.use_parallel_residual:
        raise refuse(model, target, "its MLP stands beside its attention, not after it (use_parallel_residual=True)")


def _common(config: Any) -> dict[str, Any]:
    names = ("intermediate_size", "hidden_act", "attention_dropout", "max_position_embeddings", "initializer_range")
    return {
        **{name: getattr(config, name) for name in names},
        "num_key_value_heads": config.num_attention_heads,
        "rope_parameters": copy.deepcopy(config.rope_parameters),
    }


def _tensors(model: Any, up: str, down: str) -> Tensors:
    ends = {"gpt_neox.embed_in": "model.embed_tokens", "gpt_neox.final_layer_norm": "model.norm", "lm_head": "lm_head"}
    inner = {name: name for name in ("input_layernorm", "post_attention_layernorm")}
    inner |= {"mlp.dense_h_to_4h": up, "mlp.dense_4h_to_h": down}
    return renamed(model, ends, ("gpt_neox.layers", "model.layers"), inner)
