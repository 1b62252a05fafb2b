"""Around the drafts: criteria, streamers, scores, caches, keywords, wrappers, threads and copies are as in stock."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close, assert_same_cache
from fingerprint import changes, fingerprint
from models import build, padded, prompt
from speculating import (
    ENDS,
    FEW_TOKENS,
    NEW_TOKENS,
    always,
    ask,
    assert_stock,
    counts,
    noisy,
    shared,
    speculating,
    stock,
    total,
)
from test_wrappers import add_adapter
from texts import tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer

import hf_accel
from hf_accel import DecodingConfig, KVCacheConfig, SpeculativeConfig
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.drift import CACHE

PLAIN = [DecodingConfig(), KVCacheConfig()]
EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


class Watch(StoppingCriteria):
    """Remembers what it is shown, counts its calls, and ends the first row early."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, []  # type: ignore[var-annotated]

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append((ids.tolist(), None if scores is None else len(scores)))
        rows = torch.full((len(ids),), ids.shape[1] >= self.length)
        rows[0] |= ids.shape[1] >= self.length - 2
        return rows


class Keep:
    """A streamer that remembers what it is given."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append((tuple(value.shape), value.tolist()))

    def end(self) -> None:
        self.values.append("end")


class Unknown(LogitsProcessor):
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 5 * torch.nn.functional.one_hot(ids[:, -1], scores.shape[-1])


@pytest.mark.parametrize("given", [{}, ENDS, EVERYTHING], ids=["plain", "ends", "scores"])
@pytest.mark.parametrize("rows", [1, 4])
def test_criteria_are_called_once_per_token(rows: int, given: dict[str, Any]) -> None:
    seen = []
    for model in (stock("llama"), shared("llama", "self")):
        watch = Watch(18)
        ask(model, rows, stopping_criteria=[watch], **given)
        seen.append(watch.seen)
    assert seen[0] == seen[1]
    lengths = [len(ids[0]) for ids, _ in seen[1]]
    assert lengths == list(range(lengths[0], lengths[0] + len(lengths))), "growing by one"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stop_strings(name: str) -> None:
    model, full = shared(name, "self"), ask(stock(name))[0, 6:]
    for at in (3, 4):
        stop = tokenizer().decode(full[at : at + 2])
        found = assert_stock(model, name, stop_strings=[stop], tokenizer=tokenizer())
        assert found.result.shape[1] <= 6 + at + 2
        assert_stock(model, name, do_sample=True, stop_strings=[stop, "ab"], tokenizer=tokenizer())


def test_no_time_left() -> None:
    assert assert_stock(shared("llama", "self"), "llama", 4, max_time=0.0).result.shape[1] == 10
    assert_stock(shared("llama", "self"), "llama", 1, max_time=1000.0)


@pytest.mark.parametrize("given", [{}, {"do_sample": True}, ENDS])
def test_streamers_get_token_by_token(given: dict[str, Any]) -> None:
    kept = []
    for model in (stock("gpt2"), shared("gpt2", "self")):
        streamer = Keep()
        torch.manual_seed(2)
        ask(model, 1, streamer=streamer, **given)
        kept.append(streamer.values)
    assert kept[0] == kept[1]
    assert kept[1][-1] == "end"
    assert all(shape == (1,) for shape, _ in kept[1][1:-1])


@pytest.mark.parametrize("given", [{}, {"do_sample": True, "repetition_penalty": 1.3} | ENDS])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_scores_logits_and_the_cache_are_returned(name: str, given: dict[str, Any]) -> None:
    for drafter in ("self", "model"):
        before = counts(shared(name, drafter))["calls"]
        found = assert_stock(shared(name, drafter), name, 1, **EVERYTHING, **given).result
        assert len(found.scores) == len(found.logits) == found.sequences.shape[1] - 6
        assert counts(shared(name, drafter))["calls"] == before + 1
    before = counts(shared(name, "self"))
    assert_stock(shared(name, "self"), name, 4, **EVERYTHING, **given)
    reasons = counts(shared(name, "self"))["plain_calls"]
    assert reasons["the cache of a batch is the caller's"] > before["plain_calls"].get(
        "the cache of a batch is the caller's", 0
    )


@pytest.mark.parametrize("drafter", ["lookup", "self", "model"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_returned_cache_goes_on(name: str, drafter: str) -> None:
    """A second call over the first one's cache, at every length of the first: what was fed in vain is not in it."""
    for tokens in (4, 7):
        results = []
        for model in (stock(name), shared(name, drafter)):
            first = ask(model, max_new_tokens=tokens, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, prompt(1, 3, 8)], dim=1)
            mask = torch.ones_like(ids)
            given = {"attention_mask": mask, CACHE: first[CACHE], "max_new_tokens": 14, "do_sample": False}
            results.append(model.generate(ids, return_dict_in_generate=True, **given))
        assert_close(*results)
        assert all(getattr(layer, "record_past", False) is False for layer in results[1][CACHE].layers)


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_cache_of_the_callers_is_filled_in_place(name: str, configured: bool) -> None:
    caches = []
    for model in (stock(name), shared(name, "self")):
        cache = DynamicCache(config=model.config) if configured else DynamicCache()
        found = ask(model, max_new_tokens=15, return_dict_in_generate=True, **{CACHE: cache})
        assert found[CACHE] is cache
        caches.append(cache)
        assert all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        assert all(getattr(layer, "record_past", False) is False for layer in cache.layers)
    assert_same_cache(*caches)
    assert [type(layer) for layer in caches[0].layers] == [type(layer) for layer in caches[1].layers]
    texts = [ask(m, 4, **{CACHE: DynamicCache(config=m.config)}) for m in (stock(name), shared(name, "self"))]
    assert torch.equal(*texts), "rows of stock layers cannot be apart: plainly, and right"


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"num_beams": 3}, "beam"),
        ({"num_beams": 2, "do_sample": True}, "beam"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"assistant_model": "noisy"}, "assisted"),
    ],
)
def test_other_strategies_go_to_stock(given: dict[str, Any], reason: str) -> None:
    model = speculating("llama", "lookup")
    given = {key: noisy("llama") if value == "noisy" else value for key, value in given.items()}
    texts = []
    for one in (stock("llama"), model):
        torch.manual_seed(1)
        texts.append(ask(one, 1, **given))
    assert torch.equal(*texts)
    found = hf_accel.report(model).to_dict()
    assert found["calls"]["delegated"] == 1
    assert reason in next(iter(found["calls"]["reasons"]))
    assert found["speculation"]["calls"] == 0


PLAINLY: dict[str, tuple[dict[str, Any], str]] = {
    "unknown processor": ({"logits_processor": [Unknown()]}, "Unknown may look at more than the tokens of its row"),
    "guidance": ({"guidance_scale": 1.5}, "may look at more"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
    "no cache": ({"use_cache": False}, "there is no cache"),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, "static"),
}


@pytest.mark.parametrize("title", PLAINLY)
def test_what_cannot_be_verified_is_decoded_plainly(title: str) -> None:
    given, reason = PLAINLY[title]
    model = speculating("llama", "lookup")
    ask(model, 1, **given)
    assert_stock(model, "llama", 1, **given)
    found = counts(model)
    if title == "static cache" and not found["plain_calls"]:
        assert found["calls"] == 0, "delegated to stock"
        return
    assert list(found["plain_calls"].values()) == [2]
    assert reason in next(iter(found["plain_calls"])) or title == "static cache"
    assert found["calls"] == total(found, "proposed") == 0


def test_dropout_draws_as_in_stock() -> None:
    """A step of several tokens would draw otherwise, and draws decide the text."""
    reference, model = build("gpt2"), speculating("gpt2", "self", PLAIN)
    texts = []
    for one in (reference, model):
        one.train()
        torch.manual_seed(1)
        texts.append((ask(one, 4).tolist(), torch.rand(1).item()))
    assert texts[0] == texts[1]
    assert texts[0][0] != ask(stock("gpt2"), 4).tolist(), "nothing was dropped"
    assert "training mode" in next(iter(counts(model)["plain_calls"]))
    model.eval()
    assert_stock(model, "gpt2", 4)


@pytest.mark.parametrize("rows", [1, 4])
def test_every_call_may_say_how_it_drafts(rows: int) -> None:
    model = hf_accel.optimize(build("llama"), PLAIN, draft_model=noisy("llama"))
    assert_stock(model, "llama", rows, own={"speculative": False}, suppress_tokens=FEW_TOKENS)
    assert hf_accel.report(model).speculation is None
    ways = [True, "lookup", ["lookup", "self"], always("lookup"), always("model"), always("self"), None]
    for value in ways:
        for given in ({"suppress_tokens": FEW_TOKENS}, {"do_sample": True}):
            assert_stock(model, "llama", rows, own={"speculative": value}, **given)
    assert counts(model)["calls"] == 2 * sum(value is not None for value in ways)
    assert set(counts(model)["proposed"]) >= {"lookup", "model", "self"}
    applied = [step.config for step in hf_accel.report(model).applied]
    built = [SpeculativeConfig(), SpeculativeConfig(drafter="lookup"), SpeculativeConfig(drafter=("lookup", "self"))]
    assert applied[2:] == [*built, always("lookup"), always("model"), always("self")], "built once each"
    assert not hf_accel.report(model).calls.delegated
    hf_accel.restore(model)
    with pytest.raises(ValueError, match="speculative"):
        ask(model, speculative=True)


def test_a_call_may_leave_out_what_the_model_does() -> None:
    model = speculating("llama", "self")
    assert_stock(model, "llama", 4, own={"speculative": False})
    assert counts(model)["calls"] == 0
    assert_stock(model, "llama", 4, own={"speculative": always("self")})
    assert_stock(model, "llama", 4, own={"speculative": True})
    assert counts(model)["calls"] == 2
    assert len(host_of(model).built) == 0, "its own config is there already"  # type: ignore[union-attr]


def test_tenants_draw_on_their_own_text_only() -> None:
    model = speculating("llama", "lookup", PLAIN, history_tokens=1000)
    for seed in (3, 4):
        assert_stock(model, "llama", 1, seed, own={"tenant": "a"})
    first = counts(model)
    assert_stock(model, "llama", 1, 3, own={"tenant": "b"})
    assert total(counts(model), "accepted") == total(first, "accepted"), "nothing of a's text was drafted"
    assert_stock(model, "llama", 1, 3, own={"tenant": "b"})
    b = counts(model)
    assert total(b, "accepted") - total(first, "accepted") >= NEW_TOKENS - 4, "b's own text was"
    assert_stock(model, "llama", 1, 3)
    assert total(counts(model), "accepted") == total(b, "accepted"), "no tenant is another one"
    assert_stock(model, "llama", 1, 3, own={"tenant": "a"})
    assert total(counts(model), "accepted") >= total(b, "accepted") + NEW_TOKENS - 4
    history = host_of(model).doors[Door.DRAFTS].history  # type: ignore[union-attr]
    text = ask(stock("llama"), 1, 4)[0].tolist()
    assert history.of("a").propose(text[:8], 4) == (text[8:12], 8)
    assert history.of("b").propose(text[:8], 4) == ([], 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_restore_gives_everything_back(name: str) -> None:
    model = build(name)
    before = fingerprint(model)
    drafts = {key: id(value) for key, value in noisy(name).state_dict(keep_vars=True).items()}
    others = [*PLAIN, always(("lookup", "model", "self"))]
    hf_accel.optimize(model, others, draft_model=noisy(name))
    assert_stock(model, name, 4)
    assert_stock(model, name, 4, own={"speculative": "self"})
    assert {key: id(value) for key, value in noisy(name).state_dict(keep_vars=True).items()} == drafts
    assert host_of(noisy(name)) is None
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    assert host_of(model) is None
    assert torch.equal(ask(model), ask(stock(name)))


def test_copies_pickles_and_saved_models_are_stock(tmp_path: Path) -> None:
    model = speculating("llama", ("self", "model"))
    ask(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(model.state_dict()) == list(stock("llama").state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert [type(module) for module in again.modules()] == [type(module) for module in stock("llama").modules()]
        assert host_of(again) is None
        assert torch.equal(ask(again), ask(stock("llama")))
    size = len(pickle.dumps(build("llama")))
    assert len(pickle.dumps(model)) < 1.2 * size, "drafting weights are no part of the model"
    assert_stock(model, "llama")


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_adapters(drafter: str) -> None:
    reference, model = (add_adapter(build("llama"), "llama") for _ in range(2))
    expected = ask(reference, 4)
    hf_accel.optimize(model, [*PLAIN, always(drafter)], draft_model=noisy("llama"))
    assert torch.equal(ask(model, 4), expected)
    with model.disable_adapter():
        assert torch.equal(ask(model, 4), ask(stock("llama"), 4))
    assert torch.equal(ask(model, 4), expected)
    assert counts(model)["calls"] == 3
    base = speculating("llama", "self")
    late = add_adapter(base, "llama")
    assert torch.equal(ask(late, 4), expected), "weights that came after the drafts"


def test_threads_do_not_disturb_each_other() -> None:
    model = speculating("gemma3", ("lookup", "model"), history_tokens=1000)
    seeds = [1, 2, 3, 4]
    expected = {seed: ask(stock("gemma3"), 1 + seed % 4, seed, max_new_tokens=24) for seed in seeds}
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        try:
            own = {"tenant": str(seed), "speculative": True if seed % 2 else "lookup"}
            found[seed] = ask(model, 1 + seed % 4, seed, max_new_tokens=24, **own)
        except BaseException as error:
            found[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        assert isinstance(found[seed], torch.Tensor), found[seed]
        assert torch.equal(found[seed], expected[seed])
    assert counts(model)["calls"] == 4


def test_inference_mode_and_gradients() -> None:
    model = hf_accel.optimize(build("llama"), PLAIN)
    expected = ask(stock("llama"), 4)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ask(model, 4, speculative=always("self")), expected)
    ids = padded([5, 7])
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
