"""Prompts with images for tiny models that read them: left-padded, the images of the rows at different places."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from architectures import _built
from models import PAD, Tiny, randomize
from shrinking import small_configs
from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]
FIRST, LAST = 20, 95  # ids of text: special tokens are below or above


def _grid(config: Any, images: int, generator: torch.Generator) -> tuple[Inputs, int]:
    """Return patches in a row with the grids they come from, as the models of Qwen take them, and tokens per image."""
    vision = config.vision_config
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    size = channels * vision.temporal_patch_size * vision.patch_size**2
    rows, columns = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
    grids = torch.tensor([[1, rows, columns]] * images)
    pixels = torch.randn(images * rows * columns, size, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grids}, 6


def _square(config: Any, images: int, generator: torch.Generator) -> tuple[Inputs, int]:
    """Return images [N, 3, S, S], and the tokens per image of models that keep a token for each patch."""
    vision = config.vision_config
    pixels = torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator)
    return {"pixel_values": pixels}, (vision.image_size // vision.patch_size) ** 2


def _merged(config: Any, images: int, generator: torch.Generator) -> tuple[Inputs, int]:
    size = config.vision_config.patch_size * config.spatial_merge_size * 2
    pixels = torch.randn(images, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]] * images)}, 4


PICTURES: dict[str, Callable[[Any, int, torch.Generator], tuple[Inputs, int]]] = {
    "qwen2_vl": _grid,
    "qwen2_5_vl": _grid,
    "qwen3_vl": _grid,
    "gemma3": _square,
    "llava": _square,
    "mistral3": _merged,
}


def pictured(model_type: str) -> PreTrainedModel:
    """Return a fresh tiny model that reads images, whose text depends on its weights and on them."""
    config = next(iter(small_configs(model_type)))()
    if model_type == "gemma3":
        config.mm_tokens_per_image = 4
    if model_type == "qwen2_5_vl":
        config.vision_config.window_size = 112  # which is of images, not of a text
    model = _built(model_type, config)
    randomize(model, Tiny(model_type, {}, 0.25, 1.0))
    return model


def with_images(model: PreTrainedModel, lengths: list[int], seed: int = 3) -> dict[str, torch.Tensor]:
    """Return inputs [B, T] of left-padded rows of so many tokens of text, each with an image among them."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    inputs, tokens = PICTURES[config.model_type](config, len(lengths), generator)
    rows = []
    for length in lengths:
        text = torch.randint(FIRST, LAST, (length,), generator=generator)
        rows.append(torch.cat([text[:2], torch.full((tokens,), config.image_token_id), text[2:]]))
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens_of in enumerate(rows):
        ids[row, -len(tokens_of) :], mask[row, -len(tokens_of) :] = tokens_of, 1
    kinds = (ids == config.image_token_id).long()
    named = "token_type_ids" if config.model_type == "gemma3" else "mm_token_type_ids"
    given = {named: kinds} if named in inspect.signature(type(model).forward).parameters else {}
    return {"input_ids": ids, "attention_mask": mask, **given, **inputs}
