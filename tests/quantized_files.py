"""Small models whose weights can be packed in 4 bits, saved in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import TINY, padded, randomize
from transformers import AutoConfig, AutoModelForCausalLM

import hf_accel
from hf_accel import WeightOnlyConfig

PRIVATE = {"gpt2", "mixtral", "qwen3_moe", "deepseek_v3"}  # the published layout cannot hold them
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # groups of 32 divide them
FOUR = WeightOnlyConfig(bits=4, group_size=32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded([9, 20])).logits.float()


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def wide(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A llama whose columns groups of 32 divide."""
    tiny = TINY["llama"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny.config | WIDE | changes))
    randomize(model, tiny)
    return reloaded(model, dtype)


def reloaded(model: Any, dtype: torch.dtype) -> Any:
    """In `dtype` as loading gives it: `.to` would cast the rotary frequencies, too, which no checkpoint keeps."""
    frequencies = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    model = model.to(dtype).eval()
    for name, buffer in frequencies.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    return model


def quantized(model: Any, config: WeightOnlyConfig) -> Any:
    return hf_accel.optimize(model, config)


def saved(folder: Path, model: Any = None, config: WeightOnlyConfig = FOUR, **options: Any) -> torch.Tensor:
    """Quantize and save a model; returns its logits."""
    model = quantized(wide() if model is None else model, config)
    model.save_pretrained(folder, **options)
    return logits(model)
