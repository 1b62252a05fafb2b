"""Tiny GGUF files written by the gguf package alone, as llama.cpp's converter writes them; for tests of reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from models import COMMON, Tiny, randomize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}  # bytes of a block
Kinds = Callable[[str], str]
SIZES: dict[str, Any] = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
}
TINY: dict[str, Tiny] = {
    "llama": Tiny("llama", SIZES),
    "qwen2": Tiny("qwen2", SIZES | {"head_dim": None, "tie_word_embeddings": True}, embedding=0.1),
    "qwen3": Tiny("qwen3", SIZES),
    "gemma": Tiny("gemma", SIZES | {"tie_word_embeddings": True}, embedding=0.2),
    "gemma2": Tiny(
        "gemma2",
        SIZES
        | {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        embedding=0.2,
    ),
    "phi3": Tiny("phi3", SIZES | {"head_dim": None, "original_max_position_embeddings": 512}),
    "mistral": Tiny("mistral", SIZES | {"sliding_window": None}),
}
ARCHITECTURE = {"mistral": "llama"}


def build(name: str, seed: int = 1) -> PreTrainedModel:
    """Return a random tiny model in fp32 whose dense values are bf16 numbers."""
    tiny = TINY[name]
    arguments = {key: value for key, value in tiny.config.items() if value is not None or key != "head_dim"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **arguments))
    randomize(model, tiny, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k as llama.cpp's converter orders them (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tensors_of(name: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return name in a file -> fp32 values of the tensors of a model."""
    architecture = ARCHITECTURE.get(name, name)
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for key, tensor in model.state_dict().items():
        stem, _, suffix = key.rpartition(".")
        stored = table.get_name(stem)
        if stored is None or (stem == "lm_head" and model.config.tie_word_embeddings):
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and stored.endswith(("attn_q", "attn_k")):
            heads = model.config.num_attention_heads if stored.endswith("q") else model.config.num_key_value_heads
            values = permuted(values, heads)
        if architecture.startswith("gemma") and stored.endswith("norm"):
            values = values + np.float32(1)
        found[f"{stored}.{suffix}"] = values
    return found


def metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if config.model_type == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def of_kind(kind: str, table: str = "F32") -> Kinds:
    """Return the types of tensors in a file of `kind`: dense norms and biases, and a table of its own."""
    return lambda name: (
        "F32" if "norm" in name or name.endswith("bias") else table if name.startswith("token_embd") else kind
    )


def write(
    path: Path,
    name: str,
    model: PreTrainedModel,
    kinds: Kinds,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    describe: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a model and return name in the file -> the package's own dequantization of what was written."""
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE.get(name, name))
    metadata(writer, model.config)
    describe(writer)
    values = tensors_of(name, model)
    change(values)
    written = {}
    for key, tensor in values.items():
        kind = gguf.GGMLQuantizationType[kinds(key)]
        data = quantized(tensor, kind)
        writer.add_tensor(key, data, raw_dtype=kind)
        written[key] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def quantized(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return values as bytes of a type; of those that the package does not write, random bytes with small scales."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (len(values), values.shape[1] // columns, nbytes), dtype=np.uint8)
        scale = np.abs(rng.standard_normal((*blocks.shape[:2], 2))).astype(np.float16) * np.float16(0.002)
        for index, at in enumerate(_SCALES_AT[kind.name]):
            blocks[..., at : at + 2] = scale[..., index : index + 1].view(np.uint8)
        return blocks.reshape(len(values), -1)
