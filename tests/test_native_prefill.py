"""Prompts through the native products, where ATen has none that are fast: as exact, and the report says which run."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, prompt
from transformers import PreTrainedModel

import hf_accel
from hf_accel import DecoderBlockConfig, NativeLinearConfig
from hf_accel.kernels import native

pytestmark = pytest.mark.native


@torch.no_grad()
def error(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return how far (relative, Frobenius) the logits are from those of the same weights in fp64."""
    exact = copy.deepcopy(model).double()(ids).logits
    return float((model(ids).logits.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, extent", [(None, "of any number of rows"), (16, "of up to 16 rows")])
def test_a_prompt_is_as_exact_as_stocks(
    rows: int | None, extent: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "best_rows", lambda dtype: rows)
    ids = prompt(batch=2, tokens=75)
    stock = build("llama", dtype)
    bound = error(stock, ids)
    model = hf_accel.optimize(stock, [NativeLinearConfig(), DecoderBlockConfig()])
    assert extent in str(hf_accel.report(model))
    calls: list[int] = []
    linear = native.linear
    monkeypatch.setattr(
        native, "linear", lambda x, *a, **k: calls.append(x.numel() // x.shape[-1]) or linear(x, *a, **k)
    )
    with torch.no_grad():
        found = model(ids).logits
    assert (150 in calls) == (rows is None)
    hf_accel.restore(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
    assert float((found.double() - exact).norm() / exact.norm()) < 1.2 * bound


def test_weights_that_are_stored_transposed_stay_with_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "best_rows", lambda dtype: None)
    model = hf_accel.optimize(build("gpt2", torch.bfloat16), NativeLinearConfig())
    assert "of up to 16 or any number of rows" in str(hf_accel.report(model))
    assert torch.isfinite(model(prompt(tokens=60)).logits).all()
