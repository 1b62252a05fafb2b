"""Rows that have ended leave their batch: the text, the random numbers and all that can be seen are stock's."""

from __future__ import annotations

from typing import Any

import pytest
import recurrent_models
import torch
from comparison import assert_equal_calls
from leaving_rows import CONFIGS, ENDS, ROWS, asking, fresh, shrank, watched
from models import FEW, SMALL, Tiny, build, randomize, stock
from speculating import ENDS as DRAFTED_ENDS
from speculating import ask, noisy
from test_generate import Penalise, StopAt
from texts import tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LogitsProcessorList, StoppingCriteriaList

import hf_accel
from hf_accel import DecoderBlockConfig, DecodingConfig, KVCacheConfig, SpeculativeConfig
from hf_accel.core.calls import single_tokens
from hf_accel.core.drift import CACHE
from hf_accel.errors import ConfigError

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
# how calls choose their tokens, each with rows that leave
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "sampled among few": SAMPLED,
    "repetition penalty": {"repetition_penalty": 1.3},
    "penalty and sampling": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, **SAMPLED},
    "least lengths": {"min_new_tokens": 6, "do_sample": True},
    "a time": {"max_time": 600.0},
}
# gpt2 hardly ever chooses the usual ones
ENDS_OF = dict.fromkeys(FEW, ENDS["eos_token_id"]) | {"gpt2": list(range(4, 28))}


@pytest.mark.parametrize("choice", list(CHOICES))
def test_the_text_is_stocks_and_passes_shrink(choice: str) -> None:
    found = fresh()
    assert_equal_calls(stock("llama"), found.model, asking(**CHOICES[choice]))
    assert shrank(found)
    assert found.rows["left"] == 8 - found.passes[-1]
    assert found.rows["row_steps_saved"] == sum(8 - rows for rows in found.passes)
    assert not found.rows["stayed"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("samples", [False, True])
def test_windows_biases_and_learned_positions(name: str, samples: bool) -> None:
    found = fresh(name)
    assert_equal_calls(stock(name), found.model, asking(do_sample=samples, eos_token_id=ENDS_OF[name]))
    assert shrank(found)


@pytest.mark.parametrize("configs", [[DecodingConfig()], [*CONFIGS, DecoderBlockConfig(max_rows=16)]])
def test_caches_of_transformers_and_native_layers(configs: list[Any]) -> None:
    found = fresh(configs=configs)
    assert_equal_calls(stock("llama"), found.model, asking())
    assert shrank(found)


def test_without_a_cache() -> None:
    found = fresh()
    assert_equal_calls(stock("llama"), found.model, asking(use_cache=False, max_new_tokens=16))
    assert found.passes[-1] < found.passes[0]


@pytest.mark.parametrize("name", ["granite", "lfm2"])
def test_recurrent_states_leave_with_their_rows(name: str) -> None:
    found = watched(recurrent_models.recurrent(name))
    assert_equal_calls(recurrent_models.recurrent(name), found.model, asking())
    assert shrank(found)


def test_several_texts_of_a_prompt() -> None:
    found = fresh()
    assert_equal_calls(stock("llama"), found.model, asking([7, 11], num_return_sequences=4, **SAMPLED))
    assert shrank(found)


def test_stop_strings_end_rows_where_there_is_an_end_of_text() -> None:
    text = asking()(stock("llama"))
    stop = tokenizer().decode(text[6, 12:14])
    found = fresh()
    assert_equal_calls(stock("llama"), found.model, asking(stop_strings=[stop], tokenizer=tokenizer()))
    assert shrank(found)


def test_rows_stay_where_there_is_no_end_of_text() -> None:
    """Stock writes such rows until all of them are at an end."""
    text = asking(eos_token_id=None)(stock("llama"))
    found = fresh()
    call = asking(eos_token_id=None, stop_strings=[tokenizer().decode(text[0, 14:16])], tokenizer=tokenizer())
    assert_equal_calls(stock("llama"), found.model, call)
    assert set(found.passes) == {8}


def _hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)


def _forward_of_its_own(model: Any) -> None:
    inner = model.model.norm.forward
    model.model.norm.forward = lambda states: inner(states)


class _Shifted(torch.nn.Linear):
    """Adds to each row what is meant for it."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) + torch.linspace(-1, 1, len(states))[:, None, None]


def _by_rows(model: Any) -> None:
    head = model.lm_head
    model.lm_head = _Shifted(head.in_features, head.out_features, bias=False)
    model.lm_head.weight = head.weight


# who would see it: a change of the model, further arguments of the call, and the reason that is counted
SEEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "scores": (None, {"return_dict_in_generate": True, "output_scores": True}, "is asked for"),
    "a cache": (None, {"return_dict_in_generate": True}, "is asked for"),
    "hidden states": (None, {"return_dict_in_generate": True, "output_hidden_states": True}, "is asked for"),
    "a processor": (None, {"logits_processor": lambda: LogitsProcessorList([Penalise()])}, "Penalise may look at"),
    "a criterion": (None, {"stopping_criteria": lambda: StoppingCriteriaList([StopAt(40)])}, "StopAt may look at"),
    "a hook": (_hooked, {}, "a hook of the model"),
    "a forward": (_forward_of_its_own, {}, "is not its class's"),
    "a module by rows": (_by_rows, {}, "a _Shifted is of none"),
    "the caller's cache": (None, {CACHE: DynamicCache}, "the cache is the caller's"),
}


@pytest.mark.parametrize("who", list(SEEN))
def test_rows_stay_where_somebody_would_see_them_leave(who: str) -> None:
    change, given, reason = SEEN[who]
    models = [build("llama"), build("llama")]
    for model in models if change else ():
        change(model)
    found = watched(models[1])

    def call(model: Any) -> Any:
        made = {name: value() if callable(value) else value for name, value in given.items()}
        return asking(**made)(model)

    assert_equal_calls(models[0], found.model, call)
    assert set(found.passes) == {8}
    assert [reason in each for each in found.rows["stayed"]] == [True]
    assert not found.rows["left"]


def test_rows_stay_where_modules_keep_something_of_them() -> None:
    """RecurrentGemma has its states in its modules, and begins anew with those of another shape."""

    def made() -> Any:
        config = SMALL | {"block_types": ["recurrent", "attention"], "lru_width": 48, "attention_window_size": 16}
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("recurrent_gemma", **config))
        randomize(model, Tiny("recurrent_gemma", config))
        return model.eval()

    found = watched(made(), [KVCacheConfig(), DecodingConfig()])
    assert_equal_calls(made(), found.model, asking([9] * 8, eos_token_id=list(range(4, 40))))
    assert set(found.passes) == {8}
    assert "keeps something of each row" in next(iter(found.rows["stayed"]))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_stay_where_the_longest_moves_the_others_positions(kind: str) -> None:
    """One of the rows has more positions than the model was trained for, and its end may bring another frequency."""

    def made() -> Any:
        model = build("llama")
        factors = {"short_factor": [1.0] * 5, "long_factor": [4.0] * 5} if kind == "longrope" else {"factor": 2.0}
        model.config.rope_parameters = {
            "rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors
        }  # fmt: skip
        model.config.max_position_embeddings = 24 if kind == "dynamic" else 512
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model

    found = watched(made(), [KVCacheConfig(), DecodingConfig()])
    assert_equal_calls(made(), found.model, asking())
    assert set(found.passes) == {8}
    assert "depend on the length of the text" in next(iter(found.rows["stayed"]))


def test_rows_stay_where_no_time_is_left_to_pay_for_moving_them() -> None:
    found = fresh()
    assert_equal_calls(stock("llama"), found.model, asking(max_new_tokens=6))
    assert set(found.passes) == {8}
    assert found.rows["stayed"] == {"too few steps were left to pay for moving rows": 1}


def test_nothing_leaves_where_that_is_switched_off() -> None:
    found = fresh(configs=[*CONFIGS[:2], DecodingConfig(rows_leave=False)])
    assert_equal_calls(stock("llama"), found.model, asking())
    assert set(found.passes) == {8}
    assert hf_accel.report(found.model).to_dict()["rows_left"] is None
    with pytest.raises(ConfigError, match="rows_leave is True or False; 1 was given"):
        DecodingConfig(rows_leave=1)  # type: ignore[arg-type]


def test_on_a_device_that_runs_behind_rows_leave_a_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_accel.decoding import arrival

    known, late = fresh(), fresh()
    assert_equal_calls(stock("llama"), known.model, asking(**SAMPLED))
    monkeypatch.setattr(arrival, "ASYNCHRONOUS", frozenset({"cpu"}))
    assert_equal_calls(stock("llama"), late.model, asking(**SAMPLED))
    assert shrank(late)
    assert 0 < late.rows["row_steps_saved"] < known.rows["row_steps_saved"]


@pytest.mark.parametrize("drafter", ["lookup", "model"])
@pytest.mark.parametrize("samples", [False, True])
def test_rows_leave_steps_of_several_tokens(drafter: str, samples: bool) -> None:
    """Rows end apart and at different speeds; a drafter of its own cache lets them leave that, too."""
    drafts = SpeculativeConfig(drafter=drafter, max_draft_tokens=4, adaptive=False)
    model = build("llama")
    hf_accel.optimize(model, [*CONFIGS, drafts], draft_model=noisy("llama") if drafter == "model" else None)
    call = asking(do_sample=samples)
    assert_equal_calls(stock("llama"), model, call)
    rows = hf_accel.report(model).to_dict()["rows_left"]
    assert rows["left"] >= 6
    assert rows["row_steps_saved"] > 20
    assert_equal_calls(stock("llama"), model, lambda each: ask(each, 4, **DRAFTED_ENDS, do_sample=samples))


def test_a_model_that_is_given_back_is_as_it_was() -> None:
    found, before = fresh(), build("llama").state_dict()
    asking()(found.model)
    hf_accel.restore(found.model)
    after = found.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_equal_calls(stock("llama"), found.model, asking(return_dict_in_generate=True, output_scores=True))


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def adapted() -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(build("llama"), config).eval()

    passes: list[int] = []
    honest = single_tokens.runner_of

    def watch(model: Any) -> Any:
        run = honest(model)
        return lambda **inputs: passes.append(len(inputs["input_ids"])) or run(**inputs)

    one, other = adapted(), adapted()
    hf_accel.optimize(other, CONFIGS)
    monkeypatch.setattr(single_tokens, "runner_of", watch)
    call = asking()
    torch.testing.assert_close(call(other), call(one))
    assert passes[-1] < passes[0] == len(ROWS)
