"""Calls that give positions up write what a twin writes that forgets by hand, and give up no more than they must."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import optimised
from models import NAMES, PAD, TINY, build, padded, prompt
from speculating import counts, speculating
from texts import tokenizer
from transformers import AttentionInterface, DynamicCache
from transformers.generation.streamers import BaseStreamer

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.cache.layers import evicting
from hf_accel.cache.layers.evicting import SLACK, EvictingLayer
from hf_accel.core.drift import CACHE
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.measure.subjects.retrieval import measure_retrieval, retrieval_model, retrieval_tasks

METHODS = ["streaming", "snapkv", "h2o", "tova", "key-norm"]
SINKS, WINDOW, KEPT = 2, 6, 20
NEW = 36
TWIN = "forgetful"


def config(method: str, kept: int = KEPT, **others: Any) -> KVCacheConfig:
    if method == "streaming":
        return KVCacheConfig(eviction=method, window=kept - SINKS, sinks=SINKS, **others)
    return KVCacheConfig(eviction=method, kept_tokens=kept, window=WINDOW, sinks=SINKS, **others)


class Twin:
    """Attention of one row over all positions, of which each kv head of each layer remembers a list."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.held: dict[tuple[int, int], list[int]] = {}  # by layer and kv head
        self.received: dict[tuple[int, int, int], float] = {}  # attention, by layer, kv head and position

    def attend(self, layer: int, query: Any, keys: Any, values: Any, scale: float) -> torch.Tensor:
        groups, ratio, tokens = len(keys), len(query) // len(keys), query.shape[1]
        before = keys.shape[1] - tokens
        outputs, weights = [], []
        for g in range(groups):
            held = self.held.setdefault((layer, g), [])
            held += range(before, before + tokens)
            hidden = torch.tensor([[position > before + t for position in held] for t in range(tokens)])
            for r in range(ratio):
                scores = (query[g * ratio + r] @ keys[g, held].T * scale).masked_fill(hidden, -torch.inf)
                weights.append(scores.softmax(-1))
                outputs.append(weights[-1] @ values[g, held])
        for g in range(groups):
            own = sum(weights[g * ratio : (g + 1) * ratio]) / ratio
            for position, some in zip(self.held[layer, g], own.sum(0).tolist(), strict=True):
                self.received[layer, g, position] = self.received.get((layer, g, position), 0.0) + some
        surplus = len(self.held[layer, 0]) - KEPT
        if surplus > 0 and (tokens > 1 or surplus >= SLACK):
            for g in range(groups):
                self.held[layer, g] = self.choose(layer, g, keys[g], weights, ratio)
        return torch.stack(outputs)

    def choose(self, layer: int, g: int, keys: Any, weights: list[Any], ratio: int) -> list[int]:
        held = self.held[layer, g]
        sinks, recent = held[:SINKS], held[-WINDOW if self.method != "streaming" else SINKS - KEPT :]
        own = weights[g * ratio : (g + 1) * ratio]
        score: Any = {}
        if self.method == "key-norm":
            score = {p: -float(keys[p].norm()) for p in held}
        elif self.method == "h2o":
            score = {p: self.received[layer, g, p] for p in held}
        elif self.method == "tova":
            last = sum(w[-1] for w in weights)
            score = dict(zip(held, last.tolist(), strict=True))
        elif self.method == "snapkv":
            earlier = len(held) - min(WINDOW, len(own[0]))
            looked = [w[-WINDOW:, :earlier].sum(0).tolist() for w in own]
            for column in range(earlier):
                near = slice(max(0, column - 3), column + 4)
                score[held[column]] = sum(max(head[near]) for head in looked)
            score |= dict.fromkeys(held[earlier:], torch.inf)
        best = sorted((p for p in held if p not in sinks + recent), key=lambda p: (-score.get(p, 0), -p))
        return sorted({*sinks, *recent, *best[: KEPT - len(sinks) - len(recent)]})


_twins: list[Twin] = []


def _forgetful(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _twins[-1].attend(module.layer_idx, query[0], key[0], value[0], scale)
    return output.transpose(0, 1)[None], None


AttentionInterface.register(TWIN, _forgetful)


@functools.cache
def twin_model(name: str) -> Any:
    return build(name, attention=TWIN)


@functools.cache
def ours(name: str) -> Any:
    return optimised(build(name))


@functools.cache
def stock(name: str) -> Any:
    return build(name)


def text(model: Any, inputs: Any, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **arguments})


def said_of(model: Any) -> dict[str, Any]:
    """Return what the report says of caches."""
    return hf_accel.report(model).to_dict()["kv_cache"]  # type: ignore[no-any-return]


@pytest.fixture
def twin() -> Iterator[Any]:
    """Return what writes as a model does that forgets by a method."""

    def write(name: str, method: str, ids: torch.Tensor, **arguments: Any) -> Any:
        _twins.append(Twin(method))
        return text(twin_model(name), ids, **arguments)

    yield write
    _twins.clear()


@functools.cache
def forgotten(name: str, method: str) -> torch.Tensor:
    """Return what a twin writes after the rows of `padded([50, 30])`, each alone."""
    inputs, rows = padded([50, 30]), []
    for row, tokens in ((0, 50), (1, 30)):
        _twins.append(Twin(method))
        rows.append(text(twin_model(name), inputs["input_ids"][row : row + 1, -tokens:])[0, tokens:])
    _twins.clear()
    return torch.stack(rows)


@pytest.mark.parametrize(
    "name, method", [*(("llama", method) for method in METHODS), ("qwen2", "snapkv"), ("gpt2", "h2o"), ("phi3", "tova")]
)
def test_text_is_that_of_a_twin_that_forgets_by_hand(name: str, method: str, twin: Any) -> None:
    """From prompts longer than what is kept and shorter, of which nothing is given up at once."""
    for tokens in (50, 11):
        ids = prompt(1, tokens)
        expected = twin(name, method, ids)
        assert torch.equal(text(ours(name), ids, kv_cache=config(method)), expected)
        assert not torch.equal(text(stock(name), ids), expected), "what is given up does not show"


@pytest.mark.parametrize("method", METHODS)
def test_sampling_and_processors(method: str, twin: Any) -> None:
    arguments = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2, "seed": 5}
    expected = twin("llama", method, prompt(1, 50), **arguments)
    assert torch.equal(text(ours("llama"), prompt(1, 50), kv_cache=config(method), **arguments), expected)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_give_positions_up_one_after_the_other(method: str, twin: Any) -> None:
    # no token twice: norms of its keys would be equal but for rounding
    ids = torch.randperm(100)[None, :70] + 10
    expected = twin("llama", method, ids, prefill_chunk_size=25, max_new_tokens=12)
    found = text(ours("llama"), ids, kv_cache=config(method), prefill_chunk_size=25, max_new_tokens=12)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_with_room_for_all_text_is_stocks(method: str) -> None:
    inputs = padded([40, 7, 33, 21])
    expected = text(stock("llama"), inputs)
    for arguments in ({}, {"prefill_chunk_size": 17}, {"prefill_chunk_size": 1}):
        for kept in (40 + NEW, 300):
            found = text(ours("llama"), inputs, kv_cache=config(method, kept), **arguments)
            assert torch.equal(found, expected), (arguments, kept)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_are_as_they_are_alone(method: str, bits: int | None) -> None:
    """Also rows that are shorter than what is kept: each gives up by its own length."""
    lengths = [60, 9, 41, 23]
    inputs = padded(lengths)
    chosen = config(method, bits=bits)
    found = text(ours("llama"), inputs, kv_cache=chosen)
    for row, length in enumerate(lengths):
        alone = text(ours("llama"), inputs["input_ids"][row : row + 1, -length:], kv_cache=chosen)
        assert torch.equal(found[row, 60:], alone[0, length:]), f"row of {length}"


@pytest.mark.parametrize("method", ["streaming", "h2o"])
def test_returned_sequences_are_rows_repeated(method: str) -> None:
    inputs = padded([50, 9, 30])
    arguments: dict[str, Any] = {"do_sample": True, "kv_cache": config(method), "seed": 4}
    found = text(ours("llama"), inputs, num_return_sequences=2, **arguments)
    repeated = {name: tensor.repeat_interleave(2, 0) for name, tensor in inputs.items()}
    assert torch.equal(found, text(ours("llama"), repeated, **arguments))


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.is_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.is_ended = True


def test_streamers_stop_strings_and_caches_that_are_returned(twin: Any) -> None:
    model, ids, chosen = ours("llama"), prompt(1, 50), config("snapkv")
    expected = twin("llama", "snapkv", ids)
    streamer = Collecting()
    text(model, ids, kv_cache=chosen, streamer=streamer)
    assert streamer.tokens == expected[0].tolist()
    assert streamer.is_ended
    words = tokenizer()
    stop = {"stop_strings": [words.decode(expected[0, 70:73])], "tokenizer": words}
    stopped = twin("llama", "snapkv", ids, **stop)
    assert stopped.shape[1] < expected.shape[1]
    assert torch.equal(text(model, ids, kv_cache=chosen, **stop), stopped)
    first = text(model, ids, kv_cache=chosen, max_new_tokens=20, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(first.sequences, expected[:, :70])
    assert len(first.scores) == 20
    cache = first[CACHE]
    assert (type(cache), cache.get_seq_length()) == (DynamicCache, 69)
    rest = text(model, first.sequences, **{CACHE: cache}, max_new_tokens=NEW - 20)
    assert torch.equal(rest, expected), "a returned cache goes on"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_held_is_bounded(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, sizes = [], []
    update = EvictingLayer.update

    def watch(self: EvictingLayer, keys: Any, *args: Any, **others: Any) -> Any:
        result = update(self, keys, *args, **others)
        held.append((self.buffers.stop - self.buffers.start, keys.shape[2]))
        sizes.append((self.buffers.keys.shape[2], keys.shape[2]))
        return result

    monkeypatch.setattr(EvictingLayer, "update", watch)
    model = optimised(build("llama"))
    text(model, padded([90, 9, 41, 23]), kv_cache=config(method), max_new_tokens=100)
    assert len(held) == 3 * 100
    assert all(positions <= KEPT + SLACK + tokens for positions, tokens in held)
    assert all(positions <= KEPT + SLACK + max(SLACK, tokens) for positions, tokens in sizes)
    found = said_of(model)
    assert 1.3 < found["compression"] < 3
    assert list(found["caches"]) == [f"as it is, {method}"]
    held.clear()
    text(model, prompt(1, 120), kv_cache=config(method), prefill_chunk_size=20, max_new_tokens=2)
    assert max(positions for positions, _ in held) == KEPT + 20


def test_rows_can_be_chosen_and_steps_not_taken_back() -> None:
    made = text(
        ours("llama"), padded([50, 9, 30]), kv_cache=config("h2o"), max_new_tokens=4, return_dict_in_generate=True
    )
    cache = made[CACHE]
    with pytest.raises(RuntimeError, match="cannot take steps back"):
        cache.crop(-1)
    before = [(layer.buffers.used(layer.buffers.keys), layer._valid, layer._received) for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    for (keys, valid, scores), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(layer.buffers.used(layer.buffers.keys), keys[[2, 1, 1]])
        assert torch.equal(layer._valid, valid[[2, 1, 1]])
        assert torch.equal(layer._received, scores[[2, 1, 1]])
        assert layer._counts == [KEPT + 3, 9 + 3, 9 + 3]
    assert not torch.equal(before[0][1][0], before[0][1][1])


def test_calls_with_drafts_decode_plainly_and_say_why() -> None:
    model = speculating("llama", "lookup")
    for inputs in (prompt(1, 50), padded([50, 9])):
        expected = text(ours("llama"), inputs, kv_cache=config("streaming"))
        assert torch.equal(text(model, inputs, kv_cache=config("streaming")), expected)
    found = counts(model)
    assert sum(found["proposed"].values()) == 0
    assert "EvictingLayer" in str(found)


def test_strategies_that_need_all_positions() -> None:
    model = build("llama")
    hf_accel.optimize(model, [AttentionConfig(), config("streaming"), DecodingConfig()])
    ids = prompt(1, 50)
    for arguments in ({"prompt_lookup_num_tokens": 3}, {"num_beams": 2}):
        assert torch.equal(text(model, ids, **arguments), text(stock("llama"), ids, **arguments))
    found = said_of(model)
    assert sum(found["not_done"].values()) == 2
    assert found["compression"] is None
    with pytest.raises(ConfigError, match="num_beams=2"):
        text(model, ids, kv_cache=config("h2o"), num_beams=2)
    assert not torch.equal(text(model, ids), text(stock("llama"), ids))


@pytest.mark.parametrize("name", [name for name in NAMES if "sliding_window" in TINY[name].config])
def test_models_with_windows_are_refused(name: str) -> None:
    if TINY[name].config["sliding_window"] is None:
        return
    with pytest.raises(UnsupportedModelError, match=r"sliding window|attention is 'eager'"):  # gemma2's by default
        text(ours(name), prompt(), kv_cache=config("streaming"))
    assert torch.equal(text(ours(name), prompt()), text(stock(name), prompt()))


def test_attention_that_knows_nothing_of_it_is_refused() -> None:
    model = build("llama", attention="eager")
    hf_accel.optimize(model, [DecodingConfig()])
    with pytest.raises(UnsupportedModelError, match="attention is 'eager'"):
        text(model, prompt(), kv_cache=config("streaming"))


@pytest.mark.parametrize("name", [name for name in NAMES if not TINY[name].config.get("sliding_window")])
def test_every_other_model_is_served_or_refused(name: str) -> None:
    """Text of a padded batch is that of the rows, and not stock's."""
    inputs = padded([40, 9])
    if name == "deepseek_v3":
        with pytest.raises(UnsupportedModelError, match="as tensors"):
            text(ours(name), inputs, kv_cache=config("snapkv"))
        return
    found = text(ours(name), inputs, kv_cache=config("snapkv"))
    alone = text(ours(name), inputs["input_ids"][:1], kv_cache=config("snapkv"))
    assert torch.equal(found[:1], alone)
    assert not torch.equal(alone, text(stock(name), inputs["input_ids"][:1]))
    assert not bool((found[:, 40:] == PAD).all())


def retrieving() -> Any:
    return hf_accel.optimize(retrieval_model(), [AttentionConfig(), KVCacheConfig(), DecodingConfig()])


def test_retrieval_is_lost_or_kept_as_methods_promise() -> None:
    model, tasks = retrieving(), retrieval_tasks(512, (0.1, 0.4, 0.7), repeats=8, seed=3)
    assert measure_retrieval(model, tasks).accuracy >= 0.9
    snapkv = KVCacheConfig(eviction="snapkv", kept_tokens=128, window=16, sinks=4)
    assert measure_retrieval(model, tasks, kv_cache=snapkv).accuracy >= 0.85
    streaming = KVCacheConfig(window=124, sinks=4)
    assert measure_retrieval(model, tasks, kv_cache=streaming).accuracy <= 0.4
    assert measure_retrieval(model, tasks, kv_cache=KVCacheConfig(bits=8)).accuracy >= 0.9


DEFECTS: dict[str, tuple[str, Any]] = {
    "padding is taken for tokens": ("__init__", lambda old: lambda self, c, mask, *a: old(self, c, None, *a)),
    "scores of other positions": (
        "_choose",
        lambda old: lambda self, *a: (old(self, *a)[0].sub(1).clamp_(min=0), old(self, *a)[1]),
    ),
    "the model's masks": ("update", lambda old: lambda self, k, v, *a, **o: _without_mask(old(self, k, v))),
    "given up too early": ("_observe", lambda old: lambda self, *a: _with_slack(1, lambda: old(self, *a))),
}


def _without_mask(states: Any) -> Any:
    states[0].held.visible = torch.ones_like(states[0].held.visible)
    return states


def _with_slack(slack: int, call: Any) -> Any:
    evicting.SLACK = slack
    try:
        return call()
    finally:
        evicting.SLACK = SLACK


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_planted_defects_show(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = DEFECTS[defect]
    monkeypatch.setattr(EvictingLayer, name, change(getattr(EvictingLayer, name)))
    inputs = padded([50, 30])
    try:
        found = text(ours("llama"), inputs, kv_cache=config("snapkv"))
    except (RuntimeError, IndexError):
        return
    expected = forgotten("llama", "snapkv")
    assert not torch.equal(found[:, 50:], expected)
    monkeypatch.undo()
    assert torch.equal(text(ours("llama"), inputs, kv_cache=config("snapkv"))[:, 50:], expected)
