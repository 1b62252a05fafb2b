"""The space of `generate` calls: strategies, processors, lengths, masks, keywords, caches, use as an assistant."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from comparison import Outcome, assert_same_outcome, optimised, run
from hypothesis import strategies as st
from models import TINY, build, prompt
from transformers import DynamicCache, StaticCache

from hf_accel.core.drift import CACHE

NAMES = ["llama", "gemma3", "gpt2", "bitnet"]
TOKENS = 9
# the model drafts for itself, has a draft, or drafts for another model in "self", "draft" and "drafts"
STRATEGIES = ["greedy", "sample", "beams", "lookup", "self", "draft", "drafts"]


@dataclass(frozen=True)
class Request:
    """One call, in plain values, so that a failing example can be read and repeated."""

    name: str
    strategy: str
    rows: tuple[str, ...]  # the mask of each row, a digit per prompt token
    new_tokens: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    cache: str = "none"  # none, dynamic, static, continued
    positions: bool = False
    keyword: bool = False
    streams: bool = False


class Keep:
    """A streamer that remembers what it is given."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


OPTIONS: dict[str, Any] = {
    "temperature": st.sampled_from([0.5, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 3, 20]),
    "top_p": st.sampled_from([0.5, 0.9, 1.0]),
    "min_p": st.just(0.05),
    "typical_p": st.just(0.8),
    "repetition_penalty": st.sampled_from([0.8, 1.5]),
    "no_repeat_ngram_size": st.just(2),
    "bad_words_ids": st.just([[5], [9, 20], [33, 41]]),
    "suppress_tokens": st.just(list(range(60, 110))),
    "min_new_tokens": st.integers(1, 6),
    "forced_eos_token_id": st.just(7),
    "use_cache": st.booleans(),
    "prefill_chunk_size": st.sampled_from([2, 5]),
    "renormalize_logits": st.just(True),
    "num_return_sequences": st.integers(1, 2),
    "output_hidden_states": st.just(True),
}
MASKS = st.one_of(
    st.just("1" * TOKENS),
    st.integers(1, TOKENS - 1).map(lambda n: "0" * n + "1" * (TOKENS - n)),  # left padding
    st.integers(1, TOKENS - 1).map(lambda n: "1" * (TOKENS - n) + "0" * n),  # right padding
    st.lists(st.sampled_from("01"), min_size=TOKENS, max_size=TOKENS)
    .map("".join)
    .filter(lambda mask: "1" in mask),  # holes
)


@st.composite
def requests(draw: Any, names: list[str] = NAMES, strategies: list[str] = STRATEGIES) -> Request:
    name = draw(st.sampled_from(names))
    strategy = draw(st.sampled_from(strategies))
    alone = strategy in ("lookup", "self", "draft", "drafts")
    rows = tuple(draw(st.lists(MASKS, min_size=1, max_size=1 if alone else 3)))
    chosen = draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=4))
    options = {key: draw(OPTIONS[key]) for key in sorted(chosen)}
    if draw(st.integers(0, 2)) == 0:
        options["eos_token_id"] = draw(st.sampled_from([list(range(20, 60)), list(range(3, 90)), [7]]))
    if draw(st.booleans()):
        options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return Request(
        name=name,
        strategy=strategy,
        rows=rows,
        new_tokens=draw(st.integers(1, 24 if alone else 12)),
        seed=draw(st.integers(0, 5)),
        options=options,
        cache=draw(st.sampled_from(["none", "none", "none", "dynamic", "static", "continued"])),
        positions=draw(st.integers(0, 5)) == 0,
        keyword=bool(TINY[name].keyword) and draw(st.booleans()),
        streams=len(rows) == 1 and strategy != "beams" and draw(st.booleans()),
    )


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """Return the stock and the optimised model."""
    stock = build(name)
    return stock, optimised(stock)


@functools.cache
def other(name: str) -> Any:
    """Return a stock model that differs a little from `name`'s: as its draft, or the target it drafts for."""
    model = build(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model


def perform(request: Request, model: Any) -> Any:
    """Make the call; returns its result, what a streamer saw, and the caller's cache."""
    ids = prompt(len(request.rows), TOKENS, request.seed)
    mask = torch.tensor([[int(digit) for digit in row] for row in request.rows])
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": request.new_tokens} | request.options
    if request.strategy == "sample" or (request.strategy != "greedy" and request.seed % 2):
        given["do_sample"] = True
    if request.strategy == "beams":
        given["num_beams"] = 2
    if request.strategy == "lookup":
        given["prompt_lookup_num_tokens"] = 3
    if request.strategy in ("self", "draft"):
        given["assistant_model"] = model if request.strategy == "self" else other(request.name)
    if request.positions:
        given["position_ids"] = torch.arange(TOKENS)[None].expand(len(ids), -1) * 2
    if request.keyword:
        given[str(TINY[request.name].keyword)] = (ids % 7) + 3
    streamer = Keep() if request.streams else None
    cache = None
    if request.cache == "static":
        cache = StaticCache(config=model.config, max_cache_len=64)
    elif request.cache != "none":
        cache = DynamicCache(config=model.config)
    if cache is not None:
        given[CACHE] = cache
    if request.cache == "continued":
        with torch.no_grad():
            model(ids[:, :4], attention_mask=mask[:, :4], **{CACHE: cache}, use_cache=True)
    target = model
    if request.strategy == "drafts":  # the model drafts for another one
        target, given["assistant_model"] = other(request.name), model
    result = target.generate(ids, streamer=streamer, **given)
    cached = None if cache is None else (int(cache.get_seq_length()), [layer.keys for layer in cache.layers])
    return result, streamer and streamer.values, cached


_stock: dict[str, Outcome] = {}  # by what a request says: stock's answer stays the same, whatever is planted in ours


def compare(request: Request) -> None:
    """Raise AssertionError if the optimised model's outcome is another one."""
    stock, patched = pair(request.name)
    if repr(request) not in _stock:
        _stock[repr(request)] = run(lambda model: perform(request, model), stock, request.seed)
    found = run(lambda model: perform(request, model), patched, request.seed)
    assert_same_outcome(_stock[repr(request)], found)


def differs(request: Request) -> bool:
    """Return whether the comparison fails."""
    try:
        compare(request)
    except AssertionError:
        return True
    return False
