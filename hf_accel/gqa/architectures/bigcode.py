"""gpt2 and opt as gpt_bigcode, which has learned positions, too, and knows one key/value head for all queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from hf_accel.gqa.architectures.building import built, config_for, heads_of, refuse, renamed, with_biases

TARGET = "gpt_bigcode"


def from_gpt2(model: Any) -> Any:
    """Return a GPT-2 model as gpt_bigcode; its MLP is copied, as its products are stored the other way round."""
    config = model.config
    names = ("n_positions", "n_inner", "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    more = ("layer_norm_epsilon", "initializer_range", "scale_attn_weights")
    new = config_for(model, TARGET, multi_query=False, **{name: getattr(config, name) for name in names + more})
    ends = {name: name for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")}
    inner = {name: name for name in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")}
    tensors = renamed(model, ends, ("transformer.h", "transformer.h"), inner)
    for name in list(tensors):
        if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and name.endswith("weight"):
            tensors[name] = tensors[name].detach().t().contiguous()

    def scaled() -> Any:
        for index, heads in enumerate(heads_of(model)):
            by = 1 / (index + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
            yield replace(heads, q=heads.q * by, q_bias=None if heads.q_bias is None else heads.q_bias * by)

    return built(model, new, tensors, scaled())


def from_opt(model: Any) -> Any:
    """Return an OPT model as gpt_bigcode; all but attention is shared.

    Raises:
        UnsupportedModelError: its norms stand after attention and MLP, or it projects its embeddings.
    """
    config = model.config
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise refuse(model, TARGET, "its norms do not stand before attention, MLP and head")
    if config.word_embed_proj_dim != config.hidden_size:
        raise refuse(model, TARGET, "its embeddings are projected to the hidden size")
    decoder = model.model.decoder
    new = config_for(
        model,
        TARGET,
        multi_query=False,
        n_positions=config.max_position_embeddings,
        n_inner=config.ffn_dim,
        activation_function=config.activation_function,
        resid_pdrop=config.dropout,
        embd_pdrop=0.0,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=decoder.final_layer_norm.eps,
        initializer_range=config.init_std,
    )
    at, to = "model.decoder", "transformer"
    ends = {f"{at}.embed_tokens": f"{to}.wte", f"{at}.final_layer_norm": f"{to}.ln_f", "lm_head": "lm_head"}
    inner = {"self_attn_layer_norm": "ln_1", "final_layer_norm": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    tensors = renamed(model, ends, (f"{at}.layers", f"{to}.h"), inner)
    positions = decoder.embed_positions
    tensors[f"{to}.wpe.weight"] = positions.weight.detach()[positions.offset :]
    layers = [f"{to}.h.{index}" for index in range(len(decoder.layers))]
    norms = [f"{to}.ln_f", *(f"{layer}.{name}" for layer in layers for name in ("ln_1", "ln_2"))]
    if not config.layer_norm_elementwise_affine:
        ones = torch.ones(config.hidden_size, dtype=model.dtype, device=model.device)
        tensors |= {f"{norm}.weight": ones.clone() for norm in norms}
    products = [f"{layer}.mlp.{name}" for layer in layers for name in ("c_fc", "c_proj")]
    return built(model, new, with_biases(tensors, norms + products), heads_of(model))
