"""Sampling by selection through the token loop gives stock's texts and draws; what it cannot do is left to stock."""

from __future__ import annotations

import copy
import math
import sys
import threading
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls, optimised, run
from models import build, padded, prompt
from sampling import RULES, drawn, processors, scores_of
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

import hf_accel
from hf_accel.decoding import choosing, selecting
from hf_accel.kernels import native
from hf_accel.kernels.native import Rules

pytestmark = pytest.mark.native
CALLS: dict[str, dict[str, Any]] = {
    "stock's own top-k": {},
    "usual": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "top-p": {"top_k": 0, "top_p": 0.8},
    "min-p": {"top_k": 0, "min_p": 0.05, "temperature": 1.4},
    "penalty": {"repetition_penalty": 1.3, "top_k": 10, "top_p": 0.95},
    "greedy with a penalty": {"repetition_penalty": 1.4, "do_sample": False},
}


def counted(patch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows by each choice: whether it was made natively."""
    made: list[bool] = []
    right = selecting.selected

    def selected(*args: Any) -> torch.Tensor | None:
        tokens = right(*args)
        made.append(tokens is not None)
        return tokens

    patch.setattr(choosing, "selected", selected)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("arguments", CALLS)
def test_texts_are_stocks(arguments: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    asked = {"do_sample": True, "max_new_tokens": 24} | CALLS[arguments]
    model = build(name)
    fast = optimised(model, [hf_accel.DecodingConfig()])
    for seed in range(4):
        assert_equal_calls(model, fast, lambda model: model.generate(prompt(), **asked), seed)
        assert_equal_calls(model, fast, lambda model: model.generate(**padded([3, 11, 8]), **asked), seed)
        assert_equal_calls(model, fast, lambda model: model.generate(prompt(2, 30), **asked), seed)
    assert len(made) == 4 * 3 * 24
    assert sum(made) > 0.98 * len(made)


@pytest.mark.parametrize(
    "arguments", [{"output_scores": True}, {"output_logits": True}, {"typical_p": 0.5}, {"top_h": 0.4}]
)
def test_what_needs_more_is_left_to_stock(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    asked = {"do_sample": True, "max_new_tokens": 9, "return_dict_in_generate": True, **arguments}
    model = build("llama")
    assert_equal_calls(model, optimised(model), lambda model: model.generate(prompt(), **asked))
    assert not any(made)


def test_ten_thousand_draws_are_stocks() -> None:
    generator = torch.Generator().manual_seed(3)
    made, draws = 0, 0
    for rules in (RULES["usual"], RULES["top-k"], RULES["top-p"], RULES["all"]):
        logits = [scores_of("bf16", 1, 400, generator) for _ in range(50)]
        ids = torch.randint(400, (1, 20), generator=generator)
        for draw in range(2500):
            one = logits[draw % 50]
            before = torch.get_rng_state()
            tokens = selecting.selected(one, ids, processors(rules), True)
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            expected = drawn(one, ids, rules)
            draws += 1
            if tokens is not None:
                made += 1
                assert tokens.tolist() == expected.tolist()
                assert torch.equal(after, torch.get_rng_state())
            else:
                assert torch.equal(after, before)
    assert draws == 10_000
    assert made > 9_500


def test_a_large_vocabulary_draws_as_stock() -> None:
    generator = torch.Generator().manual_seed(5)
    for rules in RULES.values():
        logits = scores_of("bf16", 1, 128_256, generator)
        ids = torch.randint(128_256, (1, 600), generator=generator)
        before = torch.get_rng_state()
        tokens = selecting.selected(logits, ids, processors(rules), True)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        if tokens is not None:
            assert tokens.tolist() == drawn(logits, ids, rules).tolist()
            assert torch.equal(after, torch.get_rng_state())


def test_equal_scores_where_top_p_ends_are_sorted_by_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of equal scores an unstable sort removes is known to it alone."""
    made = counted(monkeypatch)
    scores = torch.zeros(1, 64)
    call: Any = Asked(processors(Rules(top_p=0.5)))
    outputs: Any = Asked(None)
    outputs.logits = scores[:, None]
    for seed in range(20):
        torch.manual_seed(seed)
        tokens = choosing.next_tokens(outputs, prompt(), call).tokens
        torch.manual_seed(seed)
        assert tokens.tolist() == drawn(scores, prompt(), Rules(top_p=0.5)).tolist()
    assert made == [False] * 20


class Asked:
    """As much of a call as choosing looks at."""

    def __init__(self, logits_processor: Any) -> None:
        self.logits_processor = logits_processor
        self.generation_config = self
        self.do_sample, self.return_dict_in_generate = True, False


class Warmer(stock.TemperatureLogitsWarper):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / (self.temperature + input_ids.shape[1])


def changed(processor: Any, **values: Any) -> Any:
    found = copy.copy(processor)
    vars(found).update(values)
    return found


def test_processors_that_do_something_else_are_asked() -> None:
    warm, few, share = stock.TemperatureLogitsWarper(0.7), stock.TopKLogitsWarper(5), stock.TopPLogitsWarper(0.4)
    assert selecting.rules_of([warm, few, share]) == Rules(temperature=0.7, top_k=5, top_p=0.4)
    assert selecting.rules_of([]) == Rules()
    for others in (
        [few, warm],
        [warm, warm],
        [Warmer(0.7)],
        [stock.TopKLogitsWarper(5, filter_value=-10.0)],
        [stock.TopPLogitsWarper(0.4, min_tokens_to_keep=2)],
        [stock.MinPLogitsWarper(0.4, min_tokens_to_keep=2)],
        [stock.TypicalLogitsWarper(0.4)],
        [warm, stock.LogitNormalization()],
        [stock.TemperatureLogitsWarper(math.inf)],
        [changed(warm, temperature=-1.0)],
        [changed(warm, temperature=torch.tensor(0.5))],
        [changed(few, top_k=10**30)],
        [changed(few, top_k=5.0)],
        [changed(share, top_p=math.nan)],
    ):
        assert selecting.rules_of(LogitsProcessorList(others)) is None
    assert selecting.rules_of([stock.TopKLogitsWarper(2, min_tokens_to_keep=7)]) == Rules(top_k=7)
    scores, ids = torch.randn(2, 50), torch.randint(50, (2, 4))
    assert selecting.selected(scores, ids, LogitsProcessorList([warm]), False) is None, "greedy, with a temperature"
    uneven = [stock.RepetitionPenaltyLogitsProcessor(1.2, torch.tensor([1, 2, 3]))]
    assert selecting.selected(scores, ids, uneven, True) is None
    for other in (scores.double(), scores.to("meta"), scores.clone().requires_grad_(), scores.T):
        assert selecting.selected(other, ids, LogitsProcessorList([warm]), True) is None


def test_where_the_penalty_begins() -> None:
    scores, ids = torch.randn(2, 30) * 2, torch.randint(30, (2, 12))
    for ignored in (None, 0, 5, 12, 40, torch.tensor([0, 7]), torch.tensor([12, 3])):
        for seed in range(10):
            torch.manual_seed(seed)
            tokens = selecting.selected(scores, ids, processors(Rules(penalty=2.5), ignored), True)
            torch.manual_seed(seed)
            assert tokens is not None
            assert tokens.tolist() == drawn(scores, ids, Rules(penalty=2.5), ignored).tolist()


def test_scores_that_are_no_numbers_raise_as_in_stock() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    fast = optimised(model, [hf_accel.DecodingConfig()])
    found = [
        run(lambda model: model.generate(prompt(), do_sample=True, top_p=0.9, max_new_tokens=3), one)
        for one in (model, fast)
    ]
    assert type(found[0].error) is type(found[1].error) is RuntimeError
    assert str(found[0].error) == str(found[1].error)


def test_a_torch_that_draws_otherwise_draws_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, ids = torch.randn(1, 77), prompt()
    right = native.exponentials
    monkeypatch.setattr(native, "exponentials", lambda state, count: right(state, count) * 2)
    selecting._draws_are_known.cache_clear()
    assert selecting.selected(scores, ids, [], True) is None
    monkeypatch.undo()
    selecting._draws_are_known.cache_clear()
    assert selecting.selected(scores, ids, [], True) is not None


def test_threads_do_not_make_the_same_draws() -> None:
    scores, ids = torch.randn(1, 3000), prompt()
    torch.manual_seed(0)
    for _ in range(400):
        torch.empty(3000).exponential_(1)
    expected = torch.get_rng_state()
    torch.manual_seed(0)

    def draw() -> None:
        for _ in range(100):
            selecting.selected(scores, ids, [], True)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet where they may
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(torch.get_rng_state(), expected)
