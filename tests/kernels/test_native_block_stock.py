"""The native decoder layer against the decoder layers of transformers, with a DynamicCache, over several steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_accel.core.drift import CACHE
from hf_accel.kernels import native
from hf_accel.kernels.native import BlockShape, BlockWeights, NativeBlock, Norm, Projection, heads_in_order

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
SIZES = {
    "hidden_size": 60,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"hidden_size": 96},
    "qwen3": {},
    "phi3": {"hidden_size": 96, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "gemma2": {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 20},
    "gemma3_text": {"query_pre_attn_scalar": 20},
}
# the layer's output and its parts are rounded many times in 16 bits: a few ulps, measured against stock in fp32
ULPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def stock_layer(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SIZES, **EXTRA[kind]})
    config._attn_implementation = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") or "gemma" in kind else 1.0, 0.2)
    return model.model, config


def native_twin(layer: Any, config: Any, kind: str) -> NativeBlock:
    """Reads a transformers layer; NativeBlock checks that everything fits."""
    attention, mlp, gemma = layer.self_attn, layer.mlp, "gemma" in kind
    d = attention.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d

    def projection(module: Any, start: int = 0, stop: int | None = None) -> Projection:
        bias = None if module.bias is None else module.bias.detach()[start:stop]
        return Projection(module.weight.detach()[start:stop], bias)

    def norm(owner: Any, name: str) -> Any:
        module = getattr(owner, name, None)
        if module is None:
            return None
        return Norm(kind="rms_unit" if gemma else "rms", eps=config.rms_norm_eps, weight=module.weight.detach())

    if kind == "phi3":
        fused, i = attention.qkv_proj, config.intermediate_size
        parts = {
            "q": projection(fused, 0, q),
            "k": projection(fused, q, q + kv),
            "v": projection(fused, q + kv),
            "gate": projection(mlp.gate_up_proj, 0, i),
            "up": projection(mlp.gate_up_proj, i),
        }
    else:
        parts = {name: projection(getattr(attention, f"{name}_proj")) for name in "qkv"}
        parts |= {name: projection(getattr(mlp, f"{name}_proj")) for name in ("gate", "up")}
    parts["projections"] = tuple(parts.pop(name) for name in "qkv")
    weights = BlockWeights(
        **parts,
        o=projection(attention.o_proj),
        down=projection(mlp.down_proj),
        input_norm=norm(layer, "input_layernorm"),
        mlp_norm=norm(layer, "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"),
        attention_out_norm=norm(layer, "post_attention_layernorm") if gemma else None,
        mlp_out_norm=norm(layer, "post_feedforward_layernorm"),
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
    )
    shape = BlockShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=d,
        inner=config.intermediate_size,
        activation="gelu_tanh" if gemma else "silu",
        scale=attention.scaling,
        softcap=getattr(config, "attn_logit_softcapping", None),
        **heads_in_order(config.num_attention_heads, config.num_key_value_heads, d),
    )
    return NativeBlock(shape, weights)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("kind", EXTRA)
@torch.no_grad()
def test_equals_the_layer_of_transformers(kind: str, dtype: torch.dtype) -> None:
    model, config = stock_layer(kind, dtype)
    layer = model.layers[0]
    block = native_twin(layer, config, kind)
    d, g = block.shape.head_dim, block.shape.kv_heads
    for batch in (1, 3):
        cache = DynamicCache()
        buffers = [torch.full((batch, g, 64, d), float("nan"), dtype=dtype) for _ in range(2)]
        past = 0
        for tokens in (5, 1, 1, 3, 1):
            hidden = torch.randn(batch, tokens, config.hidden_size).to(dtype)
            positions = torch.arange(past, past + tokens)[None]
            arguments = (config.layer_types[0],) if kind == "gemma3_text" else ()
            cos, sin = model.rotary_emb(hidden, positions, *arguments)
            length = past + tokens
            mask = torch.ones(batch, 1, tokens, length, dtype=torch.bool).tril(past)
            mask[-1, :, :, 0] = batch == 1  # left padding of one token in the last row of a batch
            mask[-1, 0, 0, 0] = True
            stock_mask = mask
            if config._attn_implementation == "eager":
                stock_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            expected = layer(
                hidden,
                attention_mask=stock_mask,
                position_embeddings=(cos, sin),
                position_ids=positions,
                **{CACHE: cache},
                use_cache=True,
            )
            expected = expected[0] if isinstance(expected, tuple) else expected
            for given in (mask, stock_mask, None) if batch == 1 else (mask, stock_mask):
                found = block(hidden, cos, sin, *buffers, past, 0, given)
                error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
                assert error < ULPS[dtype], (batch, tokens, past, given is None)
            for mine, theirs in zip(buffers, (cache.layers[0].keys, cache.layers[0].values)):
                assert torch.allclose(mine[:, :, :length].double(), theirs.double(), rtol=0, atol=4 * ULPS[dtype])
            past = length


@torch.no_grad()
def test_greedy_text_in_bf16_is_that_of_stock() -> None:
    """Whole tiny models, layer by layer native: the same argmax at every step but near-ties."""
    for kind, seed in itertools.product(("llama", "qwen3"), range(2)):
        model, config = stock_layer(kind, torch.bfloat16)
        torch.manual_seed(seed)
        block, layer = native_twin(model.layers[0], config, kind), model.layers[0]
        hidden = torch.randn(1, 8, config.hidden_size).bfloat16()
        cos, sin = model.rotary_emb(hidden, torch.arange(8)[None])
        head = torch.randn(50, config.hidden_size).bfloat16()
        expected = layer(
            hidden,
            position_embeddings=(cos, sin),
            **{CACHE: DynamicCache()},
            use_cache=True,
            attention_mask=torch.ones(8, 8, dtype=torch.bool).tril()[None, None],
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        buffers = [torch.zeros(1, block.shape.kv_heads, 8, block.shape.head_dim).bfloat16() for _ in range(2)]
        found = block(hidden, cos, sin, *buffers, 0)
        wanted, got = (expected.float() @ head.float().T)[0], (found.float() @ head.float().T)[0]
        top = wanted.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > 0.02 * wanted.std()
        assert clear.sum() >= 6
        assert torch.equal(got.argmax(-1)[clear], wanted.argmax(-1)[clear])
