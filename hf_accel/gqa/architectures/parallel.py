"""gpt_neox, gptj and codegen as phi: attention and MLP read one norm, and part of each head rotates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_accel.gqa.architectures.building import (
    built,
    check_rotation,
    config_for,
    folded,
    heads_of,
    refuse,
    renamed,
    with_biases,
)
from hf_accel.gqa.heads import Heads

TARGET = "phi"


def from_gpt_neox(model: Any) -> Any:
    """Return a GPT-NeoX model with parallel attention and MLP as phi.

    Its two norms differ only in their weights and biases. These are multiplied into the products that follow, in
    double precision; the products of attention and the first of the MLP are therefore new, all else is shared.

    Raises:
        UnsupportedModelError: its MLP reads what attention wrote, or an odd number of a head's numbers rotates.
    """
    config = model.config
    if not config.use_parallel_residual:
        raise refuse(model, TARGET, "its MLP stands after its attention, not beside it (use_parallel_residual=False)")
    check_rotation(model, TARGET)
    new = config_for(
        model,
        TARGET,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        rope_parameters=copy.deepcopy(config.rope_parameters),
    )
    layers = model.gpt_neox.layers
    ends = {"gpt_neox.embed_in": "model.embed_tokens", "gpt_neox.final_layer_norm": "model.final_layernorm"}
    tensors = renamed(
        model, ends | {"lm_head": "lm_head"}, ("gpt_neox.layers", "model.layers"), {"mlp.dense_4h_to_h": "mlp.fc2"}
    )
    for index, layer in enumerate(layers):
        first, norm = layer.mlp.dense_h_to_4h, layer.input_layernorm
        weight, bias = folded(first.weight, first.bias, layer.post_attention_layernorm)
        at = f"model.layers.{index}"
        tensors |= {f"{at}.mlp.fc1.weight": weight.to(first.weight), f"{at}.mlp.fc1.bias": bias.to(first.weight)}
        tensors |= {f"{at}.input_layernorm.weight": torch.ones_like(norm.weight).detach()}
        tensors |= {f"{at}.input_layernorm.bias": torch.zeros_like(norm.bias).detach()}

    def behind_norms() -> Iterator[Heads]:
        for heads, layer in zip(heads_of(model), layers, strict=True):
            q, k, v = (
                folded(weight, bias, layer.input_layernorm)
                for weight, bias in ((heads.q, heads.q_bias), (heads.k, heads.k_bias), (heads.v, heads.v_bias))
            )
            yield Heads(q[0], k[0], v[0], heads.o, q[1], k[1], v[1], heads.o_bias)

    return built(model, new, with_biases(tensors, ["lm_head"]), behind_norms())


def from_gptj(model: Any) -> Any:
    """Return a GPT-J or CodeGen model as phi: neighbours that rotate together are moved to halves, all else is shared.

    Raises:
        UnsupportedModelError: its config names no part of the heads that rotates.
    """
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    part = config.rotary_dim
    if not part or part > size or part % 2 or int(size * (part / size)) != part:
        raise refuse(model, TARGET, f"{part} of {size} numbers of a head rotate (rotary_dim)")
    new = config_for(
        model,
        TARGET,
        intermediate_size=4 * config.hidden_size if config.n_inner is None else config.n_inner,
        hidden_act=config.activation_function,
        resid_pdrop=config.resid_pdrop,
        embd_pdrop=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        max_position_embeddings=config.n_positions,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part / size},
    )
    ends = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.final_layernorm", "lm_head": "lm_head"}
    inner = {"ln_1": "input_layernorm", "mlp.fc_in": "mlp.fc1", "mlp.fc_out": "mlp.fc2"}
    tensors = renamed(model, ends, ("transformer.h", "model.layers"), inner)
    halves = torch.cat([torch.arange(0, part, 2), torch.arange(1, part, 2), torch.arange(part, size)])

    def moved(rows: Tensor) -> Tensor:
        return rows[:, halves.to(rows.device)]

    heads = (replace(each, q=moved(each.q), k=moved(each.k)) for each in heads_of(model))
    return built(model, new, with_biases(tensors, ["lm_head"]), heads)
