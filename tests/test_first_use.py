"""Prompts of lengths that torch would have cuDNN plan first: as on a GPU, by stand-ins for what only that has."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from models import build, padded, prompt
from test_attention_ladder import calls

import hf_accel
from hf_accel import AttentionConfig
from hf_accel.attention import first_use, patcher
from hf_accel.attention import ladder as ladders
from hf_accel.attention.first_use import FirstUse
from hf_accel.attention.ladder import FIRST_USE
from hf_accel.attention.question import Visible
from hf_accel.ops.tiled import tiled_attention

WHOLE = Visible(is_causal=True)


def in_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visible, scale: float) -> torch.Tensor:
    return tiled_attention(q, k, v, scale=scale)[0].transpose(1, 2).contiguous()


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let torch plan everything, and have a FlashAttention."""
    patch.setattr(first_use, "is_planned", lambda query, key, value: True)
    patch.setattr(ladders, "_is_planned", lambda shape: True)
    patch.setattr(first_use, "is_usable", lambda query, value: True)
    patch.setattr(first_use, "flash_attention", in_tiles)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)


def states(tokens: int, past: int = 0, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    return tuple(torch.randn(batch, h, t, 16) for h, t in ((4, tokens), (2, tokens + past), (2, tokens + past)))  # type: ignore[return-value]


def served(first: FirstUse, *given: torch.Tensor, visible: Visible = WHOLE) -> bool:
    found = first.attend(*given, visible, 0.25)  # type: ignore[call-arg]
    if found is None:
        return False
    q, k, v = given
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    return True


def test_a_length_is_served_until_a_plan_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own count: each thread, each length, each number of rows."""
    monkeypatch.setattr(first_use, "PAIRS", 2.5 * 4 * 12 * 12 * 16 / 128)
    first = FirstUse()
    assert [served(first, *states(12)) for _ in range(5)] == [True, True, True, False, False]
    assert [served(first, *states(13)) for _ in range(4)] == [True, True, True, False]  # longer, so paid by as many
    assert [served(first, *states(12, batch=2)) for _ in range(3)] == [True, True, False]
    of_thread: list[bool] = []
    thread = threading.Thread(target=lambda: of_thread.extend(served(first, *states(12)) for _ in range(4)))
    thread.start()
    thread.join()
    assert of_thread == [True, True, True, False]


def test_what_is_no_whole_prompt_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = FirstUse()
    assert served(first, *states(12))
    assert not served(first, *states(1))
    assert not served(first, *states(12, past=3))
    assert not served(first, *states(12), visible=Visible())
    assert not served(first, *states(12), visible=Visible(mask=torch.ones(1, 1, 12, 12, dtype=torch.bool)))
    query, key, value = states(12)
    assert not served(first, query.requires_grad_(), key, value)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not served(first, *states(12))


def test_what_torch_does_not_plan_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(first_use, "is_planned", lambda query, key, value: bool(asked.append(1)))
    first = FirstUse()
    assert not any(served(first, *states(12)) for _ in range(3))
    assert len(asked) == 1


def test_a_failure_is_for_torchs_choice_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fails(*given: Any) -> torch.Tensor:
        tried.append(1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(first_use, "flash_attention", fails)
    stock, model = build("llama"), hf_accel.optimize(build("llama"), [AttentionConfig()])
    for _ in range(2):
        assert_equal_calls(stock, model, lambda m: m.generate(prompt(tokens=60), max_new_tokens=6))
    assert len(tried) == 1
    assert FIRST_USE not in calls(model)["calls"]


def test_shapes_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "MOST_SHAPES", 3)
    first = FirstUse()
    for tokens in range(5, 15):
        served(first, *states(tokens))
        assert len(first._of_thread.spent) <= 3


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_text_is_stocks(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts, until they are paid for; padded ones and steps as before; and all is undone."""
    stock, model = build(name), build(name)
    with hf_accel.optimized(model, [AttentionConfig(backend=backend)]):
        assert "by FlashAttention, until a plan" in str(hf_accel.report(model))
        for _ in range(2):
            assert_equal_calls(stock, model, lambda m: m.generate(prompt(tokens=60), max_new_tokens=6))
        taken = calls(model)["calls"][FIRST_USE]
        assert taken >= 2 * stock.config.num_hidden_layers
        assert_equal_calls(stock, model, lambda m: m.generate(**padded([34, 51]), max_new_tokens=6))
        assert calls(model)["calls"][FIRST_USE] == taken
        monkeypatch.setattr(first_use, "PAIRS", 0.0)
        assert_equal_calls(stock, model, lambda m: m.generate(prompt(tokens=60), max_new_tokens=6))
        assert calls(model)["calls"][FIRST_USE] == taken
    assert_equal_calls(stock, model, lambda m: m.generate(prompt(tokens=60), max_new_tokens=6))


def test_attention_that_a_user_registered_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patcher, "is_untouched", lambda: False)
    model: Any = hf_accel.optimize(build("llama"), [AttentionConfig()])
    assert "until a plan" not in str(hf_accel.report(model))


@pytest.mark.gpu
def test_lengths_that_are_new_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, with what it has: the same attention as torch's choice, and none of it planned."""
    monkeypatch.undo()
    query, key, value = (x.cuda().bfloat16() for x in states(12))
    if not first_use.is_planned(query, key, value):
        pytest.skip("torch plans nothing on this card")
    found = FirstUse().attend(query, key, value, WHOLE, 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )
    assert found is not None
    assert ((found - expected.transpose(1, 2)).float().norm() / expected.float().norm()) < 1e-2
