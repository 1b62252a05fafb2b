"""Saved models that tests read in few bits, and what they are compared with: the same, quantized in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import TINY, Tiny, prompt, randomize
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hf_accel
from hf_accel import WeightOnlyConfig

FOUR = WeightOnlyConfig(bits=4, group_size=32)
_WIDE = {"hidden_size": 64, "intermediate_size": 96}  # groups of 32 divide them
_TEXT = TINY["llama"].config | _WIDE | {"head_dim": 16, "num_hidden_layers": 1}
WIDE = {name: TINY[name].config | _WIDE for name in ("llama", "qwen2", "gemma2", "phi3", "mixtral")} | {
    "llama": TINY["llama"].config | _WIDE | {"head_dim": 16},
    "gpt2": TINY["gpt2"].config | {"n_embd": 64},
    "qwen3_moe": TINY["qwen3_moe"].config | _WIDE | {"moe_intermediate_size": 32},
}


def written(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a model of random weights; returns the folder."""
    options = {"max_shard_size": "60KB"} if changes.pop("sharded", False) else {}
    if name == "llava":
        config = AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **_TEXT},
            vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                           "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
            image_token_index=9,
        )  # fmt: skip
        model: Any = AutoModelForImageTextToText.from_config(config)
        randomize(model, Tiny("llava", {}))
    else:
        tiny = TINY[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **WIDE[name] | changes))
        randomize(model, tiny)
    model.to(dtype).save_pretrained(folder / "model", **options)
    return folder / "model"


def in_memory(folder: Path, config: WeightOnlyConfig = FOUR, **options: Any) -> Any:
    """Return the model of a folder as quantizing it in memory leaves it."""
    cls = AutoModelForImageTextToText if "llava" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return hf_accel.optimize(cls.from_pretrained(folder, **options), config, originals="drop")


def assert_same(one: Any, other: Any) -> None:
    """Compare classes, configs, every tensor, and logits."""
    assert type(one).__name__ == type(other).__name__
    assert one.config.to_dict() == other.config.to_dict()
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    tensors, twins = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
    assert tensors.keys() == twins.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == twins[name].dtype, name
        assert torch.equal(tensor, twins[name]), name
        assert tensor.requires_grad == twins[name].requires_grad, name
    with torch.no_grad():
        assert torch.equal(one(prompt(2)).logits, other(prompt(2)).logits)


def packs(folder: Path) -> list[Path]:
    """Return the packs that are kept beside a folder."""
    return sorted(folder.with_name(f"{folder.name}.hf_accel").glob("*"))
