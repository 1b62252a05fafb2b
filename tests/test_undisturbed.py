"""Trials leave nothing of theirs in a model, and find nothing of an earlier call there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SMALL, prompt
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_accel.core.model.undisturbed import undisturbed

ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "factor": 2.0,
        "short_factor": [1.0] * 6,
        "long_factor": [3.0] * 6,
    },
}


def state(module: nn.Module) -> dict[str, Any]:
    """Return everything that a module holds, tensors by identity and value."""
    held = {**vars(module), **module._buffers}
    return {
        name: (id(value), value.tolist()) if isinstance(value, torch.Tensor) else repr(value)
        for name, value in held.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize("rope", ROPES)
def test_the_frequencies_of_a_long_text_do_not_stay(rope: str) -> None:
    config = AutoConfig.for_model("llama", **SMALL | {"max_position_embeddings": 32, "rope_parameters": ROPES[rope]})
    model = AutoModelForCausalLM.from_config(config).eval()
    rotary = model.model.rotary_emb
    before = state(rotary)
    with undisturbed(model), torch.no_grad():
        model(prompt(1, 40))
        assert state(rotary) != before, "a long text changes nothing, so this proves nothing"
    assert state(rotary) == before


class Keeping(nn.Module):
    """Keeps what it learns wherever a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.rope_deltas: Any = None
        self.seen: list[int] = []
        self.table: dict[str, int] = {}
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("longest", torch.zeros(2))

    def forward(self, value: int) -> Any:
        found = self.rope_deltas
        self.rope_deltas, self.new = torch.tensor([value]), value
        self.seen.append(value)
        self.table["last"] = value
        self.count += value
        self.longest = torch.full((3,), float(value))
        return found


@pytest.mark.parametrize("inference", [False, True])
def test_every_place_is_put_back_even_after_an_error(inference: bool) -> None:
    model = Keeping()
    with torch.inference_mode(inference):
        model(3)
    before = state(model)

    def fail() -> None:
        with undisturbed(model):
            assert model(5) is None, "the offset of an earlier call was found"
            assert state(model) != before
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert state(model) == before
    assert model.rope_deltas.item() == 3
