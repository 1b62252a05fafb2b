"""What speculation must not touch, or leaves to plain decoding: each once gave wrong text, or left something behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_same_outcome, run
from models import COMMON, Tiny, build, padded, randomize
from speculating import always, ask, assert_stock, counts, noisy, shared, speculating, stock, total
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
)

import hf_accel
from hf_accel import ConfigError, DecodingConfig, KVCacheConfig, SpeculativeConfig, UnsupportedModelError
from hf_accel.core.drift import CACHE

PLAIN = [DecodingConfig(), KVCacheConfig()]


def gpt_neo() -> PreTrainedModel:
    """Return a model whose attention has a window of its own, of which neither cache nor masks know."""
    config = GPTNeoConfig(
        **COMMON | {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 96},
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=256,
    )
    model = GPTNeoForCausalLM(config).eval()
    randomize(model, Tiny("gpt_neo", {}, 0.35, 0.1))
    return model


def test_windows_that_only_the_attention_knows() -> None:
    original = gpt_neo()
    model = hf_accel.optimize(copy.deepcopy(original), [*PLAIN, always(("lookup", "self"), bits=8)])
    for lengths in ([9], [3, 11, 8, 5]):
        given = padded(lengths) | {"max_new_tokens": 30}
        assert torch.equal(model.generate(**given), original.generate(**given))
    assert counts(model)["plain_calls"] == {"rows of this model cannot have different lengths": 1}
    assert total(counts(model), "accepted") > 0
    assert "masks of its own" in str(hf_accel.report(model))


def test_a_draft_model_whose_rows_cannot_be_apart() -> None:
    draft = BloomForCausalLM(BloomConfig(**COMMON | {"hidden_size": 32, "n_layer": 2, "n_head": 4})).eval()
    model = hf_accel.optimize(build("llama"), [*PLAIN, always(("lookup", "model"))], draft_model=draft)
    for rows in (4, 1):
        assert_stock(model, "llama", rows)
    assert counts(model)["calls"] == 2
    assert "rows of the draft model cannot have different lengths" in str(hf_accel.report(model))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_row_is_the_row_alone(name: str, rows: int) -> None:
    model = shared(name, "self")
    inputs = padded([9, 3, 5, 7][:rows])
    together = model.generate(**inputs, max_new_tokens=20)
    for row in range(rows):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
        assert torch.equal(alone[0, ids.shape[1] :], together[row, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_to_draw_from_is_an_error(rows: int) -> None:
    """Stock's error, also where it comes up in the middle of a step of several tokens."""
    nothing = {"do_sample": True, "suppress_tokens": list(range(128))}
    later = {"do_sample": True, "sequence_bias": [[[token], -torch.inf] for token in range(128)]}
    for given in (nothing, later):
        outcomes = [run(lambda m, g=given: ask(m, rows, **g), m) for m in (stock("llama"), shared("llama", "self"))]
        assert isinstance(outcomes[0].error, RuntimeError)
        assert type(outcomes[1].error) is type(outcomes[0].error)
        assert str(outcomes[1].error) == str(outcomes[0].error)


def test_a_batch_over_the_callers_cache() -> None:
    """It is left with rows of one length, so that a second call over it goes on."""
    inputs, texts = padded([5, 9, 7, 6]), []
    model = speculating("llama", "self")
    for each in (stock("llama"), model):
        cache = DynamicCache(config=each.config)
        text = each.generate(**inputs, max_new_tokens=10, **{CACHE: cache})
        mask = torch.cat([inputs["attention_mask"], torch.ones(4, text.shape[1] - 9, dtype=torch.long)], dim=1)
        texts.append(each.generate(text, attention_mask=mask, max_new_tokens=10, **{CACHE: cache}))
    assert torch.equal(*texts)
    assert counts(model)["plain_calls"] == {"the cache of a batch is the caller's": 2}


class Raises(StoppingCriteria):
    """Fails at the third token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] >= 9:
            raise OSError("the disk is full")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_failing_call_leaves_windows_as_they_were() -> None:
    model = speculating("mistral", "self")
    cache = DynamicCache(config=model.config)
    with pytest.raises(OSError, match="full"):
        ask(model, stopping_criteria=[Raises()], **{CACHE: cache})
    assert [layer.record_past for layer in cache.layers] == [False] * len(cache.layers)
    assert_stock(model, "mistral", 4, max_new_tokens=20)


def test_two_ways_to_draft_wherever_they_are_said() -> None:
    model = speculating("llama", "lookup")
    ids = torch.tensor([[9, 20, 33]])
    lookup = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=3)
    for arguments, keywords in (((ids, lookup), {}), ((ids,), {"generation_config": lookup})):
        with pytest.raises(ConfigError, match="prompt_lookup_num_tokens"):
            model.generate(*arguments, **keywords, speculative=True)
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens"):
        ask(model, speculative=True)
    ask(model, speculative=True, prompt_lookup_num_tokens=None)
    assert_same_outcome(run(ask, stock("llama")), run(ask, model))


def test_a_draft_model_of_a_very_short_context() -> None:
    draft = build("gpt2")
    draft.config.n_positions = 20
    model = build("llama")
    with pytest.raises(UnsupportedModelError, match="context of 20 tokens"):
        hf_accel.optimize(model, always("model"), draft_model=draft)
    assert_same_outcome(run(ask, stock("llama")), run(ask, model))


def test_history_shorter_than_a_match() -> None:
    for tokens in (1, 63):
        with pytest.raises(ConfigError, match="at least 64"):
            SpeculativeConfig(history_tokens=tokens)
    SpeculativeConfig(history_tokens=64)


def test_a_plan_keeps_the_draft_model() -> None:
    model = build("llama")
    draft = noisy("llama")
    plan = hf_accel.plan(model, always("model"), draft_model=draft)
    hf_accel.optimize(model, plan)
    assert_stock(model, "llama")
    report = hf_accel.report(model)
    hf_accel.restore(model)
    assert total(report.to_dict()["speculation"], "proposed") > 0, "what was counted outlives the model's restoration"
    hf_accel.optimize(model, plan, draft_model=noisy("llama"))
    assert plan.draft_model is draft, "a plan is not changed by being applied"


def test_a_static_cache_is_named() -> None:
    model = speculating("llama", "lookup")
    ask(model, cache_implementation="static")
    [(reason, _)] = counts(model)["plain_calls"].items()
    assert "Static" in reason


def test_configs_of_calls_leave_a_bounded_amount_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_accel.core.calls.hosting import host_of
    from hf_accel.speculative import patcher

    monkeypatch.setattr(patcher, "MOST_CONFIGS", 3)
    model = hf_accel.optimize(build("llama"), [KVCacheConfig(), DecodingConfig()])
    for most in range(1, 8):
        ask(model, speculative=SpeculativeConfig(drafter="lookup", max_draft_tokens=most))
    assert len(host_of(model).built["speculative"]) == 3
    told = [step.config.max_draft_tokens for step in hf_accel.report(model).applied[2:]]
    assert told == [5, 6, 7]
