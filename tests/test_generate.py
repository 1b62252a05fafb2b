"""Every way of calling `generate`, with everything exact applied, gives what the stock model gives."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import exact
from comparison import Outcome, assert_equal_calls, assert_gives, optimised, run
from models import COMMON, EOS, FEW, NAMES, SMALL, Tiny, build, on_models, padded, prompt, randomize, stock
from texts import tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import hf_accel

SERVED, BEAMS, ASSISTED = "", "beam", "assisted"


class Penalise(LogitsProcessor):
    """A stateful processor: lowers the tokens it saw chosen, by how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores.scatter_add_(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -float(self.calls)))
        return scores


class StopAt(StoppingCriteria):
    """Ends a row at `length` tokens, and the first row two tokens earlier."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(None if scores is None else len(scores))
        rows = torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)
        rows[0] |= input_ids.shape[1] >= self.length - 2
        return rows


def plain(**arguments: Any) -> Callable[[Any], Any]:
    """A call on one prompt of 11 tokens; `make_...` arguments are made anew for each model."""

    def call(model: Any) -> Any:
        ids = prompt()
        given = {name.removeprefix("make_"): value() if name.startswith("make_") else value
                 for name, value in arguments.items()}  # fmt: skip
        given = {"max_new_tokens": 14, "attention_mask": torch.ones_like(ids)} | given
        return model.generate(ids, **given)

    return call


def batch(**arguments: Any) -> Callable[[Any], Any]:
    return lambda model: model.generate(**padded([3, 11, 8]), **({"max_new_tokens": 14} | arguments))


def sample(**arguments: Any) -> Callable[[Any], Any]:
    return batch(do_sample=True, **arguments)


def everything(**arguments: Any) -> dict[str, Any]:
    return arguments | {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "greedy": (plain(do_sample=False), SERVED),
    "greedy batch": (batch(do_sample=False), SERVED),
    "one token": (plain(max_new_tokens=1), SERVED),
    "past the window": (plain(max_new_tokens=60), SERVED),
    "end of text": (batch(eos_token_id=list(range(20, 60)), pad_token_id=3), SERVED),
    "end of text, minimum": (batch(eos_token_id=list(range(20, 60)), min_new_tokens=6), SERVED),
    "sampling": (sample(), SERVED),
    "temperature": (sample(temperature=0.6), SERVED),
    "top-k": (sample(top_k=5), SERVED),
    "top-p": (sample(top_p=0.8, top_k=0), SERVED),
    "min-p": (sample(min_p=0.1), SERVED),
    "typical": (sample(typical_p=0.7), SERVED),
    "epsilon and eta": (sample(epsilon_cutoff=0.01, eta_cutoff=0.01), SERVED),
    "sampling to the end": (sample(eos_token_id=list(range(20, 50)), top_k=10), SERVED),
    "repetition penalty": (batch(repetition_penalty=1.4), SERVED),
    "no repeated n-grams": (batch(no_repeat_ngram_size=2), SERVED),
    "bad words": (batch(bad_words_ids=[[5], [9, 20], [33]]), SERVED),
    "forced tokens": (batch(forced_bos_token_id=8, forced_eos_token_id=EOS), SERVED),
    "suppressed tokens": (batch(suppress_tokens=list(range(0, 90)), begin_suppress_tokens=[100, 101]), SERVED),
    "sequence bias": (batch(sequence_bias=[[[5], 4.0], [[9, 20], -5.0]]), SERVED),
    "guidance": (plain(guidance_scale=1.5), SERVED),
    "watermark": (sample(watermarking_config={"bias": 2.5, "seeding_scheme": "selfhash"}), SERVED),
    "renormalised": (sample(renormalize_logits=True, top_k=9), SERVED),
    "several sequences": (sample(num_return_sequences=3), SERVED),
    "beams": (batch(num_beams=3), BEAMS),
    "beams, several sequences": (batch(num_beams=4, num_return_sequences=3, length_penalty=0.5), BEAMS),
    "beams to the end": (batch(num_beams=3, eos_token_id=list(range(20, 60)), early_stopping=True), BEAMS),
    "beam sample": (sample(num_beams=3, top_k=20), BEAMS),
    "custom processor": (plain(make_logits_processor=lambda: LogitsProcessorList([Penalise()])), SERVED),
    "custom criterion": (
        lambda model: model.generate(**padded([3, 11, 8]), stopping_criteria=StoppingCriteriaList([StopAt(20)]),
                                     max_new_tokens=30),
        SERVED,
    ),
    "prompt lookup": (plain(prompt_lookup_num_tokens=3, max_new_tokens=40), ASSISTED),
    "chunked prefill": (plain(prefill_chunk_size=4), SERVED),
    "chunked prefill, batch": (batch(prefill_chunk_size=4), SERVED),
    "without cache": (batch(use_cache=False, max_new_tokens=6), SERVED),
    "everything returned": (batch(**everything()), SERVED),
    "everything returned, sampling": (sample(**everything(top_k=12)), SERVED),
    "scores of beams": (batch(num_beams=3, return_dict_in_generate=True, output_scores=True), BEAMS),
    "only logits": (plain(return_dict_in_generate=True, output_logits=True), SERVED),
    "asked for without a dict": (plain(output_scores=True, output_logits=True), SERVED),
    "no time left": (plain(max_time=0.0), SERVED),
    "time enough": (plain(max_time=1000.0), SERVED),
    "maximum length": (plain(max_new_tokens=None, max_length=25), SERVED),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, Any]]:
    """Stock and optimised model by name, built once: calls must not disturb each other either."""
    built: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in built:
            built[name] = (stock(name), optimised(stock(name)))
        return built[name]

    return get


@pytest.fixture(scope="module")
def speculating() -> Callable[[str], Any]:
    """Optimised models that draft with their own weights in 8 bits, which are right mostly, not always."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            drafts = hf_accel.SpeculativeConfig(drafter=("lookup", "self"), bits=8, max_draft_tokens=4, adaptive=False)
            built[name] = optimised(stock(name), [*exact(stock(name)), drafts])
        return built[name]

    return get


# where architectures differ: caches, masks, positions, states, rows that go on or end; what is done to scores is one
EVERYWHERE = [
    "greedy batch",
    "past the window",
    "end of text",
    "sampling",
    "guidance",
    "several sequences",
    "beams",
    "prompt lookup",
    "chunked prefill, batch",
    "without cache",
    "everything returned",
]


@functools.cache
def outcome_of_stock(title: str, name: str) -> Outcome:
    return run(CALLS[title][0], stock(name))


@pytest.mark.parametrize("title,name", on_models(CALLS, EVERYWHERE))
def test_equal_to_stock(title: str, name: str, models: Any) -> None:
    _, patched = models(name)
    call, reason = CALLS[title]
    before = hf_accel.report(patched).to_dict()["calls"]
    assert_gives(outcome_of_stock(title, name), patched, call)
    after = hf_accel.report(patched).to_dict()["calls"]
    if title in ("prompt lookup", "guidance") and before == after:
        pytest.fail("the call was not counted")
    if reason == SERVED:
        assert (after["served"], after["delegated"]) == (before["served"] + 1, before["delegated"]), after
    else:
        assert (after["served"], after["delegated"]) == (before["served"], before["delegated"] + 1)
        new = {text for text, count in after["reasons"].items() if count != before["reasons"].get(text, 0)}
        assert any(reason in text for text in new), f"no reason with {reason!r}: {new}"


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("title", CALLS)
def test_equal_to_stock_speculating(title: str, name: str, speculating: Any) -> None:
    """Drafts are verified at every step of every call that can be served so; what is served is as without."""
    assert_gives(outcome_of_stock(title, name), speculating(name), CALLS[title][0])


@pytest.mark.parametrize("name", NAMES)
def test_attentions_are_stocks(name: str) -> None:
    """Attention weights are only returned by eager attention."""
    stock = build(name, attention="eager")
    call = batch(return_dict_in_generate=True, output_attentions=True, output_scores=True, max_new_tokens=6)
    result = assert_equal_calls(stock, optimised(stock), call)
    assert result.attentions[0][0] is not None


@pytest.mark.parametrize("name", FEW)
def test_attentions_asked_of_sdpa(name: str, models: Any) -> None:
    stock, patched = models(name)
    call = batch(return_dict_in_generate=True, output_attentions=True, max_new_tokens=6)
    try:
        call(stock)
    except ValueError:
        with pytest.raises(ValueError):
            call(patched)
        return
    assert_equal_calls(stock, patched, call)


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_sees_what_stock_shows_it(name: str, models: Any) -> None:
    seen = []
    for model in models(name):
        criterion = StopAt(20)
        batch(stopping_criteria=[criterion], return_dict_in_generate=True, output_scores=True)(model)
        seen.append(criterion.seen)
    assert seen[0] == seen[1]
    assert seen[0][0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_stop_strings(name: str, models: Any) -> None:
    stock, patched = models(name)
    full = plain(do_sample=False)(stock)[0, 11:]
    stop = tokenizer().decode(full[6:8])
    result = assert_equal_calls(stock, patched, plain(stop_strings=[stop], tokenizer=tokenizer(), do_sample=False))
    assert result.shape[1] < 11 + 14, "the stop string never appeared"


@pytest.mark.parametrize("name", NAMES)
def test_text_streamer(name: str, models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for model in models(name):
        plain(streamer=TextStreamer(tokenizer(), skip_prompt=True))(model)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0].strip()) >= 20


@pytest.mark.parametrize("name", FEW)
def test_iterator_streamer_in_a_thread(name: str, models: Any) -> None:
    pieces = []
    for model in models(name):
        streamer = TextIteratorStreamer(tokenizer(), timeout=60.0)
        thread = threading.Thread(target=plain(streamer=streamer), args=(model,))
        thread.start()
        pieces.append(list(streamer))
        thread.join()
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize("name", FEW)
def test_streamer_refused_for_batches_as_by_stock(name: str, models: Any) -> None:
    for model in models(name):
        with pytest.raises(ValueError, match="batch size 1"):
            batch(streamer=TextStreamer(tokenizer()))(model)


def test_streamer_gets_the_same_values(models: Any) -> None:
    class Keep:
        def __init__(self) -> None:
            self.values: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append((value.tolist(), str(value.device)))

        def end(self) -> None:
            self.values.append("end")

    kept = []
    for model in models("llama"):
        streamer = Keep()
        batch(streamer=streamer, eos_token_id=list(range(20, 60)))(model)
        kept.append(streamer.values)
    assert kept[0] == kept[1]
    assert kept[0][-1] == "end"


def test_max_time_stops(models: Any) -> None:
    """A criterion that waits makes any time limit pass after the first tokens."""

    class Wait(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            time.sleep(0.15)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    _, patched = models("llama")
    ids = plain(max_time=0.5, stopping_criteria=[Wait()], max_new_tokens=100)(patched)
    assert 12 <= ids.shape[1] <= 17


@pytest.mark.parametrize("way,name", on_models(["greedy", "sampling"], everywhere=["greedy"]))
def test_assistant_model(way: str, name: str, models: Any) -> None:
    """Another model drafts, stock and optimised, and the model drafts for itself."""
    stock, patched = models(name)
    draft = build(name)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    fast_draft = optimised(draft)
    for assistant in (lambda model: draft, lambda model: fast_draft, lambda model: model):
        assert_equal_calls(
            stock,
            patched,
            lambda model, a=assistant: plain(assistant_model=a(model), do_sample=way == "sampling", max_new_tokens=30)(
                model
            ),
        )


@pytest.mark.parametrize("name", FEW)
def test_as_an_assistant_of_a_stock_model(name: str, models: Any) -> None:
    stock, patched = models(name)
    target = build(name)
    call = lambda model: plain(assistant_model=model, max_new_tokens=30)(target)  # noqa: E731
    assert_equal_calls(stock, patched, call)


def test_unknown_arguments_fail_as_in_stock(models: Any) -> None:
    for model in models("llama"):
        with pytest.raises(ValueError, match="nonsense"):
            plain(nonsense=3)(model)


def test_custom_generate_is_passed_on(models: Any) -> None:
    """A decoding loop of the caller's replaces ours as it replaces stock's."""

    def loop(model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
             generation_config: Any, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        return torch.cat([input_ids, input_ids], dim=1)

    stock, patched = models("llama")
    before = hf_accel.report(patched).to_dict()["calls"]["delegated"]
    assert_equal_calls(stock, patched, plain(custom_generate=loop))
    assert hf_accel.report(patched).to_dict()["calls"]["delegated"] == before + 1


def test_failed_calls_are_not_counted(models: Any) -> None:
    _, patched = models("llama")
    before = hf_accel.report(patched).to_dict()["calls"]
    with pytest.raises(ValueError):
        plain(num_beams=2, num_return_sequences=5)(patched)
    assert hf_accel.report(patched).to_dict()["calls"] == before


@pytest.mark.parametrize(
    "model_type, config",
    [
        ("mamba", COMMON | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
        ("lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}),
        ("recurrent_gemma", SMALL | {"num_hidden_layers": 3, "lru_width": 48}),
    ],
)
def test_caches_with_layers_of_linear_attention(model_type: str, config: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
    randomize(model, Tiny(model_type, config))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    patched = optimised(model)
    for call in (plain(**everything()), batch(), sample()):
        assert_equal_calls(model, patched, call)
    assert hf_accel.report(patched).to_dict()["calls"]["served"] == 3
