"""Steps of several texts, each over a cache of its own, as one pass of the model: each gets what it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merging import merged, own_cache
from models import build, prompt

import hf_accel
from hf_accel import AttentionConfig, DecoderBlockConfig, NativeLinearConfig
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.core.drift import CACHE
from hf_accel.kernels import native

pytestmark = pytest.mark.native
LENGTHS = (5, 23, 1, 12, 9, 30, 2, 17)


def begun(model: Any, lengths: tuple[int, ...], codec: Codec) -> list[Any]:
    """Caches of texts of these lengths."""
    caches = [own_cache(model, codec) for _ in lengths]
    for number, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        model(prompt(1, length, number), use_cache=True, **{CACHE: cache})
    return caches


def tokens_of(turn: int, count: int) -> Any:
    return prompt(count, 1, 50 + turn)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_a_pass_over_caches_of_their_own(name: str, dtype: torch.dtype, bits: int | None) -> None:
    codec = AS_IS if bits is None else Codec(bits)
    steps = [NativeLinearConfig(), DecoderBlockConfig(max_rows=40), AttentionConfig()]
    model = hf_accel.optimize(build(name, dtype), steps)
    together, alone = begun(model, LENGTHS, codec), begun(model, LENGTHS, codec)
    lengths = list(LENGTHS)
    for turn in range(4):
        ids, positions = tokens_of(turn, len(lengths)), torch.tensor(lengths)[:, None]
        found = model(ids, position_ids=positions, use_cache=True, **{CACHE: merged(together)}).logits
        for row, cache in enumerate(alone):
            given = {"position_ids": positions[row : row + 1], "use_cache": True, CACHE: cache}
            expected = model(ids[row : row + 1], **given).logits
            assert torch.equal(found[row : row + 1], expected) or native.status().isa == "amx"
        lengths = [length + 1 for length in lengths]
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
