"""Models that read images: their layers run natively, with angles by axis where there are such, and text is stock's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_gives, run
from models import SMALL, Tiny, padded, prompt, randomize
from speculating import FEW_TOKENS, always
from test_discovery_layers import counted
from transformers import AutoConfig, AutoModelForImageTextToText

import hf_accel
from hf_accel import DecoderBlockConfig, DecodingConfig, KVCacheConfig

IMAGE = 6  # the id of image tokens, which prompts do not have otherwise
TEXT = SMALL | {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
CLIP = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
QWEN = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP | {"model_type": "clip_vision_model", "image_size": 16},
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": CLIP | {"image_size": 16},
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "text_config": TEXT | AXES,
        "vision_config": QWEN | {"embed_dim": 32, "hidden_size": 64},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | AXES,
        "vision_config": QWEN
        | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 40, "window_size": 32}
        | {"fullatt_block_indexes": [1]},
    },
}  # fmt: skip


def model_of(name: str) -> Any:
    config = AutoConfig.for_model(name, image_token_id=IMAGE, **CONFIGS[name])
    config.image_token_index = IMAGE
    model = AutoModelForImageTextToText.from_config(config)
    randomize(model, Tiny(name, {}, 0.25, 0.1 if name == "gemma3" else 1.0))  # which it multiplies
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def asked(name: str, rows: int = 1) -> dict[str, Any]:
    """Return prompts of text, an image of four tokens and text; the second of two rows has padding in front."""
    inputs = {"input_ids": prompt(1, 13), "attention_mask": torch.ones(1, 13, dtype=torch.long)}
    if rows > 1:
        inputs = padded([13, 11])
    inputs["input_ids"][:, 5:9] = IMAGE
    generator = torch.Generator().manual_seed(0)
    if "qwen" in name:
        inputs["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 8 * 8, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    else:
        inputs["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
    if name == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


@pytest.mark.native
@pytest.mark.parametrize("name", CONFIGS)
def test_text_after_images(name: str) -> None:
    stock = model_of(name)
    model = hf_accel.optimize(copy.deepcopy(stock), [DecoderBlockConfig(), KVCacheConfig(), DecodingConfig()])
    calls = [
        lambda model: model.generate(**asked(name), max_new_tokens=10, do_sample=False),
        lambda model: model.generate(**asked(name, 2), max_new_tokens=10, do_sample=False),
        lambda model: model.generate(**asked(name), max_new_tokens=10, do_sample=True, top_k=20),
    ]
    for call in calls:
        with counted() as kernels:
            assert_gives(run(call, stock), model, call)
        assert len(kernels) >= 2 * 9, "both layers in all steps"
    other = asked(name)
    other["pixel_values"] = -other["pixel_values"]
    one, two = (stock.generate(**given, max_new_tokens=10, do_sample=False) for given in (asked(name), other))
    assert not torch.equal(one, two), "the image shows in the text"


@pytest.mark.native
@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_after_images(name: str) -> None:
    stock = model_of(name)
    configs = [DecoderBlockConfig(), KVCacheConfig(), DecodingConfig(), always("lookup")]
    model = hf_accel.optimize(copy.deepcopy(stock), configs)

    def call(model: Any) -> Any:
        return model.generate(**asked(name), max_new_tokens=16, do_sample=False, suppress_tokens=FEW_TOKENS)

    assert_gives(run(call, stock), model, call)
    told = hf_accel.report(model).to_dict()["speculation"]
    assert told["plain_calls"] or sum(told["proposed"].values()), "drafts, or why there are none"
