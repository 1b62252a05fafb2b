"""Runs one call on a stock model and on its optimised twin and compares everything they return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalogue import exact
from transformers import PreTrainedModel

import hf_accel
from hf_accel.attention import ladder
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE

# largest difference of logits, of scores and of states in fp32: other summation orders over a few dozen terms
TOLERANCE = 2e-4
Call = Callable[[PreTrainedModel], Any]


@dataclass
class Outcome:
    """What a call returned, or the kind of error it raised; and where the random numbers stood afterwards."""

    result: Any
    error: BaseException | None
    random: torch.Tensor


def run(call: Call, model: PreTrainedModel, seed: int = 0) -> Outcome:
    """Run `call` from a fixed random state, keeping an error as a result."""
    torch.manual_seed(seed)
    try:
        result, error = call(model), None
    except Exception as raised:
        result, error = None, raised
    return Outcome(result, error, torch.get_rng_state())


def optimised(model: PreTrainedModel, configs: list[Config] | None = None) -> PreTrainedModel:
    """Return an optimised copy of `model`; by default with everything exact that fits it, however busy the machine."""
    twin = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "grouped_gain", lambda *_: 2.0)
        return hf_accel.optimize(twin, exact(twin) if configs is None else configs)


def assert_close(expected: Any, found: Any, where: str = "result") -> None:
    """Compare nested results: types, shapes and ids equal; floating-point values within TOLERANCE."""
    assert type(found) is type(expected), f"{where}: {type(found)} instead of {type(expected)}"
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape, f"{where}: shape {found.shape} instead of {expected.shape}"
        assert found.dtype == expected.dtype, f"{where}: {found.dtype} instead of {expected.dtype}"
        if expected.is_floating_point():
            assert torch.equal(found.isfinite(), expected.isfinite()), f"{where}: other values are infinite"
            finite = expected.isfinite()
            difference = (found[finite] - expected[finite]).abs()
            bound = TOLERANCE * (1 + expected[finite].abs())
            assert bool((difference <= bound).all()), f"{where}: differs by {difference.max():.1e}"
        else:
            assert torch.equal(found, expected), f"{where}: {found.tolist()} instead of {expected.tolist()}"
    elif isinstance(expected, dict):
        assert list(found) == list(expected), f"{where}: keys {list(found)} instead of {list(expected)}"
        for key in expected:
            if key != CACHE:
                assert_close(expected[key], found[key], f"{where}.{key}")
        if CACHE in expected:
            assert_same_cache(expected[CACHE], found[CACHE])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), f"{where}: {len(found)} entries instead of {len(expected)}"
        for index, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert_close(a, b, f"{where}[{index}]")
    else:
        assert found == expected, f"{where}: {found!r} instead of {expected!r}"


def assert_same_cache(expected: Any, found: Any) -> None:
    """Compare two caches: kind, length, and the keys and values or the linear attention's states of every layer."""
    assert type(found) is type(expected), f"cache: {type(found)} instead of {type(expected)}"
    if expected is None:
        return
    if not expected.layers or not all(hasattr(layer, "conv_states") for layer in expected.layers):  # these tell none
        assert int(found.get_seq_length()) == int(expected.get_seq_length()), "cache: other length"
    assert len(found.layers) == len(expected.layers), "cache: other number of layers"
    for index, (a, b) in enumerate(zip(expected.layers, found.layers, strict=True)):
        assert isinstance(b, type(a)), f"cache layer {index}: {type(b)} is no {type(a)}"
        for name in ("conv_states", "recurrent_states"):
            assert_close(getattr(a, name, None), getattr(b, name, None), f"cache layer {index} {name}")
        for name in ("keys", "values"):
            one, two = getattr(a, name, None), getattr(b, name, None)
            if isinstance(one, torch.Tensor) and one.numel():
                assert_close(one, two, f"cache layer {index} {name}")


def assert_same_outcome(expected: Outcome, found: Outcome) -> None:
    """Compare two outcomes: the same kind of error, or the same result after the same draws of random numbers."""
    assert type(found.error) is type(expected.error), f"{found.error!r} instead of {expected.error!r}"
    if expected.error is None:
        assert_close(expected.result, found.result)
        assert torch.equal(found.random, expected.random), "another number of random draws"


def assert_equal_calls(stock: PreTrainedModel, patched: PreTrainedModel, call: Call, seed: int = 0) -> Any:
    """Run `call` on both and compare; returns stock's result."""
    return assert_gives(run(call, stock, seed), patched, call, seed)


def assert_gives(expected: Outcome, patched: PreTrainedModel, call: Call, seed: int = 0) -> Any:
    """Compare with stock's outcome and return its result. A call that fails on stock proves nothing here."""
    if expected.error is not None:
        raise AssertionError("the call fails on the stock model") from expected.error
    found = run(call, patched, seed)
    if found.error is not None:
        raise AssertionError("the call fails on the optimised model only") from found.error
    assert_same_outcome(expected, found)
    return expected.result
