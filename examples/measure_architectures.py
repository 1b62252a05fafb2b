"""Measure decoding of shapes whose layers are found: `python measure_architectures.py SHAPE [DTYPE] [ROUNDS]`.

Random weights of the shape in bf16 or fp32; stock and optimised in alternation, a prompt of 64 tokens, 32 new ones, no
drafts. Prints milliseconds per token, their ratio, and the bytes read per second beside the memory's rate in that run.
SHAPE may be any of `SHAPES`.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hf_accel
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.shadow import shadow
from hf_accel.kernels import native
from hf_accel.measure.bandwidth import read_bandwidth

WIDE = {"hidden_size": 2048, "num_attention_heads": 16}
NARROW = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 1 / 64,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 2048}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3-3b": ("smollm3", WIDE | {"num_hidden_layers": 36, "num_key_value_heads": 4, "intermediate_size": 11008,
                                      "vocab_size": 128256, "tie_word_embeddings": True}),
    "olmo2-1b": ("olmo2", WIDE | {"num_hidden_layers": 16, "num_key_value_heads": 16, "intermediate_size": 8192,
                                  "vocab_size": 100352}),
    "granite-3.3-2b": ("granite", WIDE | GRANITE | {"num_hidden_layers": 40, "num_attention_heads": 32,
                                                    "num_key_value_heads": 8, "intermediate_size": 8192,
                                                    "vocab_size": 49159, "tie_word_embeddings": True}),
    "qwen2.5-vl-3b": ("qwen2_5_vl", {"text_config": WIDE | {"num_hidden_layers": 36, "num_key_value_heads": 2,
                                                            "intermediate_size": 11008, "vocab_size": 151936,
                                                            "rope_parameters": MROPE},
                                     "vision_config": VISION, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "pythia-160m": ("gpt_neox", NARROW | {"intermediate_size": 3072, "vocab_size": 50304}),
    "opt-125m": ("opt", NARROW | {"ffn_dim": 3072, "word_embed_proj_dim": 768, "vocab_size": 50272}),
}  # fmt: skip
NEW = 32


def built(shape: str, dtype: torch.dtype) -> Any:
    """Return a model of the shape with random weights."""
    kind, sizes = SHAPES[shape]
    auto = AutoModelForImageTextToText if "vision_config" in sizes else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def ms_per_token(model: Any, ids: torch.Tensor) -> float:
    """Return milliseconds per token, without those of the prompt."""

    def seconds(new: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    return (seconds(NEW + 2) - seconds(2)) / NEW * 1e3


def main(shape: str, dtype: str = "bfloat16", rounds: str = "3") -> None:
    """Measure one shape and print a line."""
    model = built(shape, getattr(torch, dtype))
    stock, ids = shadow(model), torch.randint(5, 1000, (1, 64), generator=torch.Generator().manual_seed(0))
    hf_accel.optimize(model, [hf_accel.DecoderBlockConfig(), hf_accel.NativeLinearConfig(), hf_accel.KVCacheConfig(),
                              hf_accel.DecodingConfig()])  # fmt: skip
    times = [(ms_per_token(stock, ids), ms_per_token(model, ids)) for _ in range(int(rounds))]
    ours, theirs = (statistics.median(column) for column in list(zip(*times))[::-1])
    rate, memory = Anatomy.of(model).read_bytes / ours / 1e6, read_bandwidth() / 1e9
    print(
        f"{shape} {dtype} ({native.status().isa}): stock {theirs:.2f} ms, optimised {ours:.2f}, {theirs / ours:.2f} x"
    )
    print(f"  {rate:.1f} GB/s of {memory:.1f}; rounds {[tuple(round(t, 2) for t in pair) for pair in times]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
