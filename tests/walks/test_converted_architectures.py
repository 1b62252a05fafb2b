"""Any architecture with several key/value heads is converted exactly where that loses nothing, or refused.

All key/value heads of a tiny model are made one in disguise: equal keys, and values that differ by an invertible map
that the output projection takes back. One head is enough then, so a conversion that understands them is exact.
What cannot be built small is skipped with the reason.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import CannotBuild, architectures, tiny
from models import prompt

import hf_accel
from hf_accel.errors import HfAccelError
from hf_accel.gqa.heads import attention_layers, read_heads, write_heads
from hf_accel.ops.tolerances import of_step_logits

# neighbours that rotate together, layers without positions, states beside attention, a norm with a bias
FEW = ["cohere2", "llama4_text", "zamba2", "nemotron"]
# values pass a norm without a weight; norms over all heads; latent attention; no heads; a gate
REFUSED = ["gemma4_text", "gemma3n_text", "olmo2", "deepseek_v3", "rwkv", "qwen3_next"]


def disguise(model: Any) -> None:
    """Make all key/value heads of each layer one, seen through a map of its own."""
    generator = torch.Generator().manual_seed(0)
    for layer in attention_layers(model):
        heads = read_heads(layer, model.config)
        groups, size, _ = heads.v.shape
        maps = torch.eye(size) + 0.3 * torch.randn(groups, size, size, generator=generator) / size**0.5
        back = maps.inverse().repeat_interleave(len(heads.q) // groups, 0)
        made = replace(
            heads,
            k=heads.k[:1].expand_as(heads.k),
            k_bias=None if heads.k_bias is None else heads.k_bias[:1].expand_as(heads.k_bias),
            v=maps @ heads.v[:1],
            v_bias=None if heads.v_bias is None else maps @ heads.v_bias[0],
            o=torch.einsum("ehd,hdf->ehf", heads.o, back),
        )
        write_heads(layer, model.config, made)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt(2)).logits


def check(model_type: str) -> str:
    """Convert a model whose heads are one to one head; returns "exact", or why it was refused."""
    try:
        model = copy.deepcopy(tiny(model_type))
    except CannotBuild as reason:
        pytest.skip(str(reason))
    try:
        if attention_layers(model)[0].kv_heads == 1:
            return "it has one head"
        disguise(model)
        new = hf_accel.convert_gqa(model, 1, calibration=prompt(24, 32), repair_steps=0)
    except HfAccelError as error:
        return str(error)
    expected, found = logits(model), logits(new)
    assert float((found - expected).norm()) <= of_step_logits(model.dtype, False) * float(expected.norm())
    return "exact"


@pytest.mark.parametrize("model_type", FEW)
def test_one_head_in_disguise_is_found(model_type: str) -> None:
    assert check(model_type) == "exact"


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_understood_is_refused(model_type: str) -> None:
    assert check(model_type) != "exact"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(architectures()) - {*FEW, *REFUSED}))
def test_every_architecture(model_type: str) -> None:
    check(model_type)
