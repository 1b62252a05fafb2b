"""Drafts change no text on any architecture of the installed transformers, past its windows and with padded rows.

Vocabularies are restricted, so that lookup finds drafts. What cannot be drafted for is decoded plainly and says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import CannotBuild, architectures, tiny
from comparison import assert_same_outcome, run
from models import Tiny, padded, prompt, randomize
from speculating import FEW_TOKENS, always, counts, total

import hf_accel
from hf_accel.errors import HfAccelError

# where steps of several tokens are not single ones: looks ahead, hides padding its own way, chooses keys by scores
FEW = {"bert": "other logits than single ones", "git": "rows of this model", "axk2": ""}
ASKED: dict[str, Any] = {"max_new_tokens": 40, "suppress_tokens": FEW_TOKENS}
REPEATING = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4]])
CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: model.generate(prompt(1, 10), do_sample=False, **ASKED),
    "sampled": lambda model: model.generate(REPEATING, do_sample=True, **ASKED),
    "padded": lambda model: model.generate(**padded([9, 3, 6]), do_sample=False, **ASKED),
    "padded, sampled": lambda model: model.generate(**padded([9, 3, 6]), do_sample=True, **ASKED),
}


def differences(stock: Any, drafter: str, expected: dict[str, Any]) -> tuple[list[str], dict[str, Any] | None]:
    """Return what differs from stock, and the counts of the report; None where drafts are refused."""
    model = copy.deepcopy(stock)
    try:
        hf_accel.optimize(model, [always(drafter)])
    except HfAccelError:
        return [], None
    found = []
    for title, call in CALLS.items():
        try:
            assert_same_outcome(expected[title], run(call, model))
        except AssertionError as difference:
            found.append(f"{drafter}, {title}: {difference}"[:400])
    return found, counts(model)


def walk(model_type: str, drafters: tuple[str, ...]) -> list[dict[str, Any] | None]:
    try:
        stock = tiny(model_type)
    except CannotBuild as reason:
        pytest.skip(f"no tiny {model_type}: {reason}")
    expected = {title: run(call, copy.deepcopy(stock)) for title, call in CALLS.items()}
    walked = [differences(stock, drafter, expected) for drafter in drafters]
    assert not [line for found, _ in walked for line in found]
    return [report for _, report in walked]


@pytest.mark.parametrize("model_type", FEW)
def test_architectures_whose_steps_differ(model_type: str) -> None:
    (report,) = walk(model_type, ("lookup",))
    if report is None:
        assert not FEW[model_type], "drafts are refused altogether"
        return
    assert FEW[model_type] in " ".join(report["plain_calls"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(architectures()))
def test_no_draft_changes_text(model_type: str) -> None:
    for report in walk(model_type, ("lookup", "self", "layer_skip")):
        assert report is None or report["plain_calls"] or total(report, "proposed"), "neither drafts nor a reason"


def test_layers_that_share_keys_and_values() -> None:
    """Have nothing in the cache, so that nothing has to be taken back there, whether rows are apart or not."""
    config = copy.deepcopy(tiny("gemma4_text").config)
    config.num_hidden_layers, config.num_kv_shared_layers = 4, 2
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    stock = type(tiny("gemma4_text"))(config).eval()
    randomize(stock, Tiny("gemma4_text", {}, 0.25, 0.2))
    stock.generation_config.eos_token_id, stock.generation_config.pad_token_id = None, 0
    expected = {title: run(call, copy.deepcopy(stock)) for title, call in CALLS.items()}
    found, report = differences(stock, "lookup", expected)
    assert not found
    assert report
    assert report["calls"] == len(CALLS)
    assert not report["plain_calls"]
