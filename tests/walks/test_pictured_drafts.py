"""Drafts after prompts with images: positions of several axes, offsets by images, images at the prompt alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same_outcome, run
from models import VOCABULARY
from pictures import PICTURES, pictured, with_images
from speculating import always, counts, total

import hf_accel

KEPT = range(20, 26)  # few tokens, so that lookup has its say
ASKED: dict[str, Any] = {"max_new_tokens": 20, "suppress_tokens": [t for t in range(VOCABULARY) if t not in KEPT]}
CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: model.generate(**with_images(model, [9]), do_sample=False, **ASKED),
    "sampled": lambda model: model.generate(**with_images(model, [9]), do_sample=True, **ASKED),
    "padded": lambda model: model.generate(**with_images(model, [9, 4, 6]), do_sample=False, **ASKED),
    "padded, sampled": lambda model: model.generate(**with_images(model, [5, 8]), do_sample=True, **ASKED),
}


def walk(model_type: str, drafter: str) -> dict[str, Any]:
    """Compare all calls with stock's and return the counts of the report."""
    stock = pictured(model_type)
    model = hf_accel.optimize(copy.deepcopy(stock), [always(drafter)])
    for title, call in CALLS.items():
        expected = run(call, stock)
        assert expected.error is None, f"{title} fails on the stock model: {expected.error!r}"
        assert_same_outcome(expected, run(call, model))
    return counts(model)


@pytest.mark.parametrize("model_type", PICTURES)
def test_the_text_is_stocks(model_type: str) -> None:
    found = walk(model_type, "lookup")
    assert not found["plain_calls"]
    assert found["calls"] == len(CALLS)
    assert total(found, "accepted") > len(CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PICTURES)
def test_with_drafts_of_its_own_weights(model_type: str) -> None:
    found = walk(model_type, "self")
    assert not found["plain_calls"]
    assert total(found, "accepted") > len(CALLS)


@pytest.mark.parametrize("model_type", PICTURES)
def test_images_decide_the_text(model_type: str) -> None:
    """Or the tests above would see nothing."""
    model = pictured(model_type)
    inputs = with_images(model, [9])
    others = inputs | {"pixel_values": with_images(model, [9], seed=4)["pixel_values"]}
    assert not torch.equal(*(model.generate(**each, do_sample=False, **ASKED) for each in (inputs, others)))


def test_text_alone_follows_on_images() -> None:
    """What a call with images leaves in the model, the offset of its positions, is no matter to the next."""
    stock = pictured("qwen2_vl")
    model = hf_accel.optimize(copy.deepcopy(stock), [always("lookup")])
    for call in (CALLS["padded"], lambda model: model.generate(torch.arange(20, 31)[None], do_sample=False, **ASKED)):
        assert_same_outcome(run(call, stock), run(call, model))
    assert not counts(model)["plain_calls"]


def test_inputs_are_tried_once_for_each_kind() -> None:
    stock = pictured("qwen2_5_vl")
    model = hf_accel.optimize(copy.deepcopy(stock), [always("lookup")])
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    taken = []
    for _ in range(2):
        before = len(passes), counts(model)["steps"]
        CALLS["greedy"](model)
        taken.append(len(passes) - before[0] - (counts(model)["steps"] - before[1]))
    assert taken == [1 + 4, 1], "passes beside the prompt's and those of steps"
