"""Whether captured steps give what the model gives, tried on it: left padding, two lengths, one token and several."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.compilation.caches import cache_obstacle, use_slot
from hf_accel.compilation.capture import Capture
from hf_accel.compilation.runner import record
from hf_accel.compilation.slots import Slot, capacity_for
from hf_accel.compilation.trace import trace_obstacle
from hf_accel.core.calls.rows import apart_obstacle
from hf_accel.core.drift import CACHE
from hf_accel.core.model.rope import moving_rope
from hf_accel.errors import described
from hf_accel.kernels.weights import PackedProduct
from hf_accel.ops import tolerances

PROMPT = 6
STARTS = {1: [0], 2: [2, 0]}  # of the rows, by how many there are
STEPS = {1: 1, 2: 4}  # tokens of a step, by rows
REPLAYS = 3


def step_obstacle(model: Any, capture: Capture, make_step: Any) -> str | None:
    """Return why steps of `model` cannot be captured, None if they can; the model runs some forward passes.

    capture: how; it is tried, too.
    """
    if reason := apart_obstacle(model):
        return reason
    if rope := moving_rope(model):
        return str(rope)
    for rows in STARTS:
        try:
            reason = _tried(model, rows, capture, make_step)
        except Exception as error:  # whatever a foreign model raises where it does not follow the usual contract
            reason = described(error)
        if reason is not None:
            return reason
    return None


@torch.no_grad()
def _tried(model: Any, rows: int, capture: Capture, make_step: Any) -> str | None:
    """Compare replayed steps with the model's own over a cache of transformers'."""
    tokens, starts = STEPS[rows], torch.tensor(STARTS[rows])
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    total = PROMPT + REPLAYS * tokens
    ids = torch.randint(config.vocab_size, (rows, total), generator=generator).to(model.device)
    columns = torch.arange(total)
    mask = (columns >= starts[:, None]).long().to(model.device)
    positions = (columns - starts[:, None]).clamp(min=0).to(model.device)
    caches = [DynamicCache(config=config) for _ in range(2)]
    if reason := cache_obstacle(caches[1]):
        return reason
    slot = Slot(rows, capacity_for(total), None, model.device)
    use_slot(caches[1], slot)
    slot.fill.starts.copy_(starts)

    def given(cache: Any, first: int, stop: int) -> dict[str, Any]:
        at = slice(first, stop)
        inputs = {"input_ids": ids[:, at], "position_ids": positions[:, at], "attention_mask": mask[:, :stop]}
        return inputs | {"use_cache": True, "return_dict": True, CACHE: cache}

    for cache in caches:
        model(**given(cache, 0, PROMPT))
    layers: list[Any] = caches[1].layers
    if any(layer.step_layer is None or layer.length != PROMPT for layer in layers):
        return "some of its layers keep nothing in the cache"
    if reason := trace_obstacle(model, slot, tokens):
        return reason
    slot.set_lengths([PROMPT] * rows)
    recorded = record(model, slot, tokens, capture, make_step)
    for first in range(PROMPT, total, tokens):
        recorded.step.ids.copy_(ids[:, first : first + tokens])
        recorded.step.positions.copy_(positions[:, first : first + tokens])
        found = recorded.replay().logits
        expected = model(**given(caches[0], first, first + tokens)).logits
        if not _is_close(model, found, expected):
            return "replayed steps give other logits than the model"
    return None


def _is_close(model: Any, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether logits differ by no more than rounding explains; never where one is not a number."""
    is_packed = any(isinstance(module, PackedProduct) for module in model.modules())
    bound = tolerances.of_step_logits(model.dtype, is_packed)
    difference = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return bool((difference <= bound).all())
