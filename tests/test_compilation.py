"""Calls whose steps are replayed from captures, and looked at one step late, give what the stock model gives."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cached_calls import TOLERANCE
from capturing import captures_here
from comparison import assert_equal_calls, assert_gives, optimised, run
from models import build, prompt, stock
from speculating import FEW_TOKENS, noisy
from test_generate import BEAMS, CALLS, batch, plain
from texts import tokenizer

import hf_accel
from hf_accel import AttentionConfig, CompilationConfig, DecodingConfig, KVCacheConfig, SpeculativeConfig
from hf_accel.compilation import runner
from hf_accel.compilation.capture import graph_obstacle
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.config import Config
from hf_accel.decoding import arrival

STEPS: list[Config] = [DecodingConfig(), AttentionConfig(), CompilationConfig()]
MODELS = ["llama", "mistral", "gemma3", "gpt2", "deepseek_v3", "mixtral"]
EVERYWHERE = ["greedy batch", "past the window", "sampling to the end", "everything returned"]
WITHOUT_BUFFERS = {"without cache", "prompt lookup", "guidance", "beams"}  # beside all kinds of beams


@pytest.fixture(autouse=True)
def _at_once_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is captured at once, and flags are looked at late."""
    monkeypatch.setattr(runner, "PAYS_BACK", 0)
    monkeypatch.setattr(arrival, "ASYNCHRONOUS", frozenset({"cpu"}))


def compiled(name: str, *more: Config, **options: Any) -> Any:
    """Return an optimised model whose steps are captured by the stand-in."""
    with captures_here():
        return hf_accel.optimize(build(name), [*STEPS, *more], **options)


@functools.cache
def shared(name: str) -> Any:
    return compiled(name)


def counts(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = hf_accel.report(model).to_dict()["compilation"]
    return found


@functools.cache
def outcome_of_stock(title: str, name: str) -> Any:
    return run(CALLS[title][0], stock(name))


@pytest.mark.parametrize(
    "title,name", [*((title, MODELS[0]) for title in CALLS), *itertools.product(EVERYWHERE, MODELS[1:])]
)
def test_calls_equal_stock(title: str, name: str) -> None:
    model = shared(name)
    before = counts(model)["replays"]
    assert_gives(outcome_of_stock(title, name), model, CALLS[title][0])
    replays = counts(model)["replays"] - before
    kind = CALLS[title][1]
    if title in WITHOUT_BUFFERS or kind == BEAMS or title == "no time left" or title == "one token":
        return
    found = counts(model)
    assert replays or found["calls_without_buffers"] or found["eager_steps"], "nothing was replayed, for no reason"


@pytest.mark.parametrize("name", MODELS)
def test_plain_steps_are_all_replayed(name: str) -> None:
    model = compiled(name)
    for call in (plain(do_sample=False), batch(do_sample=False), batch(do_sample=True)):
        assert_equal_calls(stock(name), model, call)
    found = counts(model)
    assert found["replays"] >= 3 * 13
    assert (found["eager_steps"], found["calls_without_buffers"]) == ({}, {})
    assert found["captures"] == 2, "one for a row, one for three"
    assert found["buffer_bytes"] > 0


DRAFTS: dict[str, SpeculativeConfig] = {
    name: SpeculativeConfig(drafter=name, max_draft_tokens=most, adaptive=False)
    for name, most in (("lookup", 4), ("layer_skip", 2), ("self", 5), ("model", 3))
}


@pytest.mark.parametrize("drafter", DRAFTS)
def test_verification_is_replayed(drafter: str) -> None:
    """Steps of several tokens are filled up to the next size, partly taken back, and rows are apart."""
    model = compiled("llama", KVCacheConfig(), DRAFTS[drafter], draft_model=noisy("llama"))
    for call in (
        plain(do_sample=False, max_new_tokens=40),
        batch(do_sample=False, max_new_tokens=30),
        batch(do_sample=True, max_new_tokens=30, top_k=10),
        batch(eos_token_id=list(range(20, 60)), pad_token_id=3),
        batch(do_sample=False, suppress_tokens=FEW_TOKENS, max_new_tokens=30),  # which repeats itself
    ):
        assert_equal_calls(stock("llama"), model, call)
    found = counts(model)
    assert found["replays"] >= 10
    assert (found["eager_steps"], found["calls_without_buffers"]) == ({}, {}), "drafts are replayed, too"
    assert sum(hf_accel.report(model).to_dict()["speculation"]["accepted"].values()) > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_cache(bits: int) -> None:
    """Captured steps over codes give the logits of a cache of codes, on the same tokens."""
    call = batch(do_sample=False, return_dict_in_generate=True, output_logits=True, max_new_tokens=8)
    plainly = hf_accel.optimize(build("llama"), [DecodingConfig(), AttentionConfig(), KVCacheConfig(bits=bits)])
    model = compiled("llama", KVCacheConfig(bits=bits))
    expected, found = call(plainly), call(model)
    for step in range(4):  # further on, a code that rounding turned makes other text
        one, other = expected.logits[step], found.logits[step]
        assert (one - other).norm() <= TOLERANCE[bits] * one.norm()
    cache = next(value for value in found.values() if hasattr(value, "layers"))
    assert [layer.bits for layer in cache.layers] == [bits] * 3
    assert counts(model)["replays"] == 7


def test_a_cache_that_was_returned_stays_as_it_was() -> None:
    """The next call takes the buffers; who kept the cache of the last one has what it held."""
    model = compiled("llama")
    first = plain(return_dict_in_generate=True, do_sample=False)(model)
    expected = plain(return_dict_in_generate=True, do_sample=False)(stock("llama"))
    model.generate(prompt(seed=9), max_new_tokens=14, do_sample=False)
    cache = next(value for value in first.values() if hasattr(value, "layers"))
    right = next(value for value in expected.values() if hasattr(value, "layers"))
    for one, other in zip(right.layers, cache.layers, strict=True):
        torch.testing.assert_close(other.keys, one.keys)
        torch.testing.assert_close(other.values, one.values)
    longer = torch.cat([first.sequences, prompt(tokens=5, seed=4)], dim=1)
    texts = [
        target.generate(longer, past_key_values=held, max_new_tokens=6, do_sample=False)
        for target, held in ((model, cache), (stock("llama"), right))
    ]
    assert torch.equal(*texts)


def test_a_text_that_outgrows_its_buffers_goes_on() -> None:
    """A chunk of the caller's own loop may be longer than the call expected."""
    model = compiled("llama")
    long = batch(do_sample=False, max_new_tokens=300)
    assert_equal_calls(stock("llama"), model, long)
    assert counts(model)["buffer_bytes"] > 0


def test_two_calls_at_once_do_not_share_buffers() -> None:
    """A call inside a call, as a processor may make one, gets a cache of its own."""
    model = compiled("llama")
    inner: list[Any] = []

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(inner) < 2:
            inner.append(plain(do_sample=False)(model))
        return scores

    found = plain(do_sample=False, logits_processor=[ask])(model)
    expected = plain(do_sample=False)(stock("llama"))
    assert torch.equal(found, expected)
    assert all(torch.equal(each, expected) for each in inner)
    assert counts(model)["calls_without_buffers"] == {"another call has the buffers": 2}


def hooked(model: Any) -> Callable[[], Any]:
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.0)
    return handle.remove


def trained(model: Any) -> Callable[[], Any]:
    model.train()
    return model.eval


def asking(model: Any) -> Callable[[], Any]:
    model.config.output_hidden_states = True
    return lambda: setattr(model.config, "output_hidden_states", False)


REASONS: dict[str, tuple[Callable[[Any], Callable[[], Any]], str]] = {
    "hooks": (hooked, "hooks"),
    "training": (trained, "training mode"),
    "hidden states": (asking, "hidden states"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_captures_cannot_see_leaves_steps_eager(what: str) -> None:
    model = compiled("llama")
    change, reason = REASONS[what]
    undo = change(model)
    before = counts(model)["replays"]
    model.generate(prompt(), max_new_tokens=6, do_sample=False)
    found = counts(model)
    assert found["replays"] == before
    assert any(reason in text for text in found["calls_without_buffers"]), found
    undo()
    assert_equal_calls(stock("llama"), model, plain(do_sample=False))
    assert counts(model)["replays"] > before


def test_a_mask_with_holes_is_left_to_stock() -> None:
    model = compiled("llama")
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[0, 4] = mask[1, 10] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock("llama").generate(ids, **options))
    assert counts(model)["calls_without_buffers"] == {"the mask hides more than padding on the left": 1}


def test_other_weights_are_captured_anew() -> None:
    model, other = compiled("llama"), build("llama")
    plain(do_sample=False)(model)
    for target in (model, other):
        with torch.no_grad():
            target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.flip(0))
    assert_equal_calls(other, model, plain(do_sample=False))
    assert counts(model)["captures"] == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("operation not permitted")])
def test_a_failed_capture_leaves_steps_eager(error: Exception) -> None:
    model = compiled("llama")
    capture = runner_of_model(model).capture
    type(capture).fails = error
    try:
        assert_equal_calls(stock("llama"), model, batch(do_sample=False))
    finally:
        type(capture).fails = None
    assert_equal_calls(stock("llama"), model, batch(do_sample=True))
    found = counts(model)
    assert found["replays"] == 0
    assert len(found["eager_steps"]) == 1
    assert str(error) in next(iter(found["eager_steps"]))


def runner_of_model(model: Any) -> runner.StaticRunner:
    host: Any = host_of(model)
    found: runner.StaticRunner = host.doors[Door.FORWARD]
    return found


def test_captures_wait_until_they_pay_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAYS_BACK", 16)
    model = compiled("llama")
    plain(max_new_tokens=8, do_sample=False)(model)
    assert counts(model)["captures"] == 0
    plain(max_new_tokens=30, do_sample=False)(model)
    assert counts(model)["captures"] == 1
    plain(max_new_tokens=3, do_sample=False)(model)
    assert counts(model)["replays"] == 29 + 2


def test_a_streamer_gets_tokens_in_order_and_none_too_many() -> None:
    class Keep:
        def __init__(self) -> None:
            self.values: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.tolist())

        def end(self) -> None:
            self.values.append("end")

    kept = []
    for model in (stock("llama"), compiled("llama")):
        streamer = Keep()
        batch(streamer=streamer, eos_token_id=list(range(20, 60)), pad_token_id=3)(model)
        kept.append(streamer.values)
    assert kept[0] == kept[1]


def test_stop_strings() -> None:
    full = plain(do_sample=False)(stock("llama"))[0, 11:]
    call = plain(stop_strings=[tokenizer().decode(full[6:8])], tokenizer=tokenizer(), do_sample=False)
    model = compiled("llama")
    assert assert_equal_calls(stock("llama"), model, call).shape[1] < 11 + 14
    assert counts(model)["replays"] > 0
    assert counts(model)["eager_steps"] == {}, "the tokenizer that passes are given is for criteria"


def test_all_of_a_plan_together() -> None:
    with captures_here():
        model = optimised(stock("llama"))
    assert_equal_calls(stock("llama"), model, batch(do_sample=False))
    hf_accel.restore(model)
    assert_equal_calls(stock("llama"), model, batch(do_sample=False))


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    yield
    shared.cache_clear()


def test_bad_configs_are_refused() -> None:
    with pytest.raises(hf_accel.ConfigError, match="graphs, compile, off"):
        CompilationConfig(mode="fast")
    with pytest.raises(hf_accel.UnsupportedModelError, match="the model is on cpu"):
        hf_accel.optimize(build("llama"), CompilationConfig())
    with captures_here(), pytest.raises(hf_accel.UnsupportedModelError, match="asks the cache for its length"):
        hf_accel.optimize(build("opt"), CompilationConfig())


def test_a_card_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card of 2016")
    reason = graph_obstacle(torch.device("cuda"))
    assert reason == "Card of 2016 has compute capability 6.1; graphs are used from 7.0 on."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert graph_obstacle(torch.device("cuda")) is None
