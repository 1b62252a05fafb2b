"""Every architecture of the installed transformers writes stock's text when it is optimised, and comes back whole.

Nothing here knows the architectures: their configs are made small by the names of their sizes. One that cannot be built
is skipped with the reason; one that cannot be optimised must say so in an error of ours, unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import CannotBuild, architectures, tiny
from catalogue import exact
from comparison import assert_same_outcome, run
from fingerprint import changes, fingerprint
from models import padded, prompt
from transformers import PreTrainedModel

import hf_accel
from hf_accel.errors import HfAccelError

# unlike one another and unlike those of tests/models.py; deepseek_v32 asks its config which attention it has
FEW = ["cohere2", "deepseek_v32", "falcon", "bloom", "granitemoe", "jamba", "olmo2", "t5"]
REPEATING = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
PLAIN: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: model.generate(prompt(), **PLAIN),
    "sampled": lambda model: model.generate(prompt(2), max_new_tokens=12, do_sample=True, top_k=20),
    "padded": lambda model: model.generate(**padded([5, 11, 3]), **PLAIN),
    "beams": lambda model: model.generate(prompt(2), num_beams=2, **PLAIN),
    "repeating": lambda model: model.generate(REPEATING, **PLAIN | {"max_new_tokens": 24}),
}


def logits(model: Any) -> Any:
    """Return the logits of one forward pass, or the kind of error that it raises."""
    inputs = {"decoder_input_ids": prompt(seed=4)} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            return model(input_ids=prompt(), **inputs).logits
    except Exception as error:
        return type(error)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num()) if isinstance(one, torch.Tensor) else one is other


def compare(stock: PreTrainedModel, goal: Callable[[Any], Any], expected: dict[str, Any]) -> list[str]:
    """Optimise a copy, make every call, restore it; return what differs from stock."""
    twin = copy.deepcopy(stock)
    before, first, found = fingerprint(twin), logits(twin), []
    try:
        hf_accel.optimize(twin, goal(twin))
    except HfAccelError:
        return [f"refused, but changed: {line}" for line in changes(before, fingerprint(twin))]
    except Exception as error:
        return [f"optimize raised {type(error).__name__}: {error}"[:600]]
    for name, call in CALLS.items():
        try:
            assert_same_outcome(expected[name], run(call, twin))
        except AssertionError as difference:
            found.append(f"{name}: {difference}"[:600])
    hf_accel.restore(twin)
    found += [f"not restored: {line}"[:600] for line in changes(before, fingerprint(twin))]
    if not same(first, logits(twin)):
        found.append("other logits after restore")
    return found


GOALS: dict[str, Callable[[Any], Any]] = {
    "goal": lambda model: "exact",
    "everything exact": exact,
    "drafts": lambda model: exact(model, speculates=True),
}


def walk(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.planner.timing.BUDGET_S", 0.05)
    try:
        stock = tiny(model_type)
    except CannotBuild as reason:
        pytest.skip(f"no tiny {model_type}: {reason}")
    expected = {name: run(call, copy.deepcopy(stock)) for name, call in CALLS.items()}
    found = {name: differences for name, goal in GOALS.items() if (differences := compare(stock, goal, expected))}
    assert not found


@pytest.mark.parametrize("model_type", FEW)
def test_unknown_architectures_write_stocks_text(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(model_type, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(architectures().keys() - set(FEW)))
def test_every_architecture_writes_stocks_text(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(model_type, monkeypatch)
