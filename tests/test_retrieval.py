"""Measuring retrieval: prompts, counting, the embedded model, and what compressed caches keep of what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_accel.errors import ConfigError
from hf_accel.measure.subjects.retrieval import (
    ASK,
    DEPTHS,
    FILLER,
    KEYS,
    PAD,
    START,
    VALUES,
    Task,
    insert_needle,
    measure_retrieval,
    retrieval_model,
    retrieval_path,
    retrieval_tasks,
    text_task,
)
from hf_accel.ops.eviction import (
    accumulate,
    attention_weights,
    keep_positions,
    kept,
    key_norm_scores,
    snapkv_scores,
    tova_scores,
)

WINDOW, SINKS = 16, 4


@cache
def model() -> Any:
    return retrieval_model()


def prefill(stock: Any, ids: Tensor) -> tuple[Tensor, DynamicCache, list[Tensor]]:
    """Return logits of the last token, the cache and each layer's rotated queries [B, H, T, D], of a Llama."""
    cached, raw = DynamicCache(config=stock.config), []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: raw.append(output))
        for layer in stock.model.layers
    ]
    logits = stock(ids, past_key_values=cached).logits[:, -1]
    for hook in hooks:
        hook.remove()
    cos, sin = stock.model.rotary_emb(raw[0], torch.arange(ids.shape[1])[None])
    size = stock.config.head_dim
    heads = [output.unflatten(-1, (-1, size)).transpose(1, 2) for output in raw]
    return logits, cached, [apply_rotary_pos_emb(head, head, cos, sin)[0] for head in heads]


def scores_by(method: str, query: Tensor, keys: Tensor, kernel_size: int = 7) -> Tensor | None:
    """Return the scores of one layer after a prefill of unpadded rows."""
    rows, positions, scale = query.shape[0], keys.shape[2], query.shape[-1] ** -0.5
    valid = torch.ones(rows, positions, dtype=torch.bool)
    causal = valid.new_ones(positions, positions).tril().expand(rows, -1, -1)
    if method == "snapkv":
        window = attention_weights(query[:, :, -WINDOW:], keys, scale, causal[:, -WINDOW:])
        return snapkv_scores(window, valid, kernel_size)
    if method == "tova":
        return tova_scores(attention_weights(query[:, :, -1:], keys, scale, causal[:, -1:]), valid)
    if method == "h2o":
        scores = None
        for start in range(0, positions, 128):
            block = slice(start, start + 128)
            scores = accumulate(scores, attention_weights(query[:, :, block], keys, scale, causal[:, block]), valid)
        return scores
    return key_norm_scores(keys) if method == "key-norm" else None


class Compressed:
    """Stock's prefill, each layer's cache cut once to 1 / ratio by a method, then stock's steps at true positions."""

    def __init__(self, stock: Any, method: str, ratio: float, kernel_size: int = 7) -> None:
        self.stock, self.method, self.ratio, self.kernel_size = stock, method, ratio, kernel_size

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **unused: Any) -> Tensor:
        assert bool(attention_mask.all())
        logits, cached, queries = prefill(self.stock, input_ids)
        length = input_ids.shape[1]
        keep, valid = int(length / self.ratio), attention_mask.bool()
        sinks, recent = (SINKS, keep - SINKS) if self.method == "streaming" else (SINKS, WINDOW)
        for layer, query in zip(cached.layers, queries):
            scores = scores_by(self.method, query, layer.keys, self.kernel_size)
            index, _ = keep_positions(scores, valid, keep, sinks, recent)
            layer.keys, layer.values = kept(layer.keys, index), kept(layer.values, index)
        ids = input_ids
        for step in range(max_new_tokens):
            ids = torch.cat([ids, logits.argmax(-1)[:, None]], dim=1)
            place = torch.tensor([[length + step]])
            logits = self.stock(ids[:, -1:], past_key_values=cached, position_ids=place).logits[:, -1]
        return ids


@cache
def accuracy(method: str, ratio: float, kernel_size: int = 7) -> float:
    tasks = retrieval_tasks(tokens=512, depths=(0.1, 0.4, 0.7), repeats=8, seed=3)
    return measure_retrieval(Compressed(model(), method, ratio, kernel_size), tasks, batch_size=24).accuracy


class Echo:
    """Answers by a rule and notes what it was called with."""

    device = torch.device("cpu")

    def __init__(self, rule: Any) -> None:
        self.rule, self.calls = rule, []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **arguments: Any) -> Tensor:
        self.calls.append((input_ids, attention_mask, arguments))
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
        return torch.cat([input_ids, torch.tensor([self.rule(prompt) for prompt in prompts])], dim=1)


def looked_up(prompt: Sequence[int]) -> list[int]:
    """Answer a question by reading the prompt."""
    place = prompt.index(prompt[-1])
    return list(prompt[place + 1 : place + 5])


@pytest.mark.parametrize("needles", [1, 8, 16])
@pytest.mark.parametrize("tokens", [83, 128, 1024])
def test_prompts_are_as_described(tokens: int, needles: int) -> None:
    tasks = retrieval_tasks(tokens, DEPTHS, repeats=3, needles=needles, seed=1)
    assert Counter(task.depth for task in tasks) == dict.fromkeys(DEPTHS, 3)
    for task in tasks:
        prompt = task.prompt
        assert len(prompt) == tokens
        assert (prompt[0], prompt[-2]) == (START, ASK)
        assert looked_up(prompt) == list(task.expected)
        counts = Counter(prompt[:-1])
        assert all(counts[value] <= 1 for value in (*KEYS, *VALUES))
        assert sum(counts[key] for key in KEYS) == needles
        assert sum(counts[value] for value in VALUES) == 4 * needles
        assert sum(counts[token] for token in FILLER) == tokens - 3 - 5 * needles
        assert all(set(prompt[s + 1 : s + 5]) <= set(VALUES) for s in range(tokens - 2) if prompt[s] in KEYS), "whole"
        place = prompt.index(prompt[-1]) - 1
        assert abs(place - task.depth * (tokens - 8)) <= 4


def test_prompts_are_of_their_seed() -> None:
    assert retrieval_tasks(128, seed=1) == retrieval_tasks(128, seed=1)
    assert retrieval_tasks(128, seed=1) != retrieval_tasks(128, seed=2)
    assert len({task.prompt for task in retrieval_tasks(128, seed=1)}) == 40


def test_needles_are_inserted_at_their_depth() -> None:
    hay = range(10, 20)
    for depth, place in ((0, 0), (0.2, 2), (0.5, 5), (1, 10)):
        task = insert_needle(hay, [1, 2], [3], [4, 5], depth, start=[9])
        assert task == Task((9, *hay[:place], 1, 2, *hay[place:], 3), (4, 5), depth)
    with pytest.raises(ConfigError, match=r"0 to 1, not 1\.5"):
        insert_needle(hay, [1], [3], [4], 1.5)


def test_counts_of_each_depth() -> None:
    tasks = retrieval_tasks(128, (0.0, 0.5), repeats=3)
    wrong = set(tasks[4].prompt)
    found = measure_retrieval(Echo(lambda prompt: [0] * 4 if set(prompt) == wrong else looked_up(prompt)), tasks, 4)
    assert (found.right, found.asked) == ({0.0: 3, 0.5: 2}, {0.0: 3, 0.5: 3})
    assert found.accuracy == 5 / 6
    assert found.at(0.5) == 2 / 3
    assert found.to_dict()["depths"][1] == {"depth": 0.5, "right": 2, "asked": 3}
    assert str(found) == "83.3 % of 6 needles retrieved: 100 % at depth 0.00, 67 % at depth 0.50"


@pytest.mark.parametrize("place", range(4))
def test_an_answer_wrong_in_one_token_is_wrong(place: int) -> None:
    def almost(prompt: Sequence[int]) -> list[int]:
        answer = looked_up(prompt)
        answer[place] += 1
        return answer

    assert measure_retrieval(Echo(almost), retrieval_tasks(128, (0.5,), 2)).accuracy == 0


def test_prompts_of_different_lengths_are_padded_on_the_left_and_arguments_handed_on() -> None:
    tasks = [task for tokens in (64, 128, 96) for task in retrieval_tasks(tokens, (0.5,), 1, needles=2)]
    tasks.append(Task(tasks[0].prompt, tasks[0].expected[:2], 0.5))
    echo = Echo(looked_up)
    assert measure_retrieval(echo, tasks, batch_size=3, use_cache=True, max_new_tokens=7).accuracy == 1
    (ids, mask, arguments), (last, _, _) = echo.calls
    assert mask.sum(1).tolist() == [64, 128, 96]
    assert bool((ids[mask == 0] == PAD).all())
    assert bool(mask[:, -1].all())
    assert (arguments["do_sample"], arguments["use_cache"], arguments["max_new_tokens"]) == (False, True, 7)
    assert last.shape == (1, 64)


def test_an_answer_that_ends_early_is_wrong_and_a_longer_one_right() -> None:
    tasks = retrieval_tasks(128, (0.5,), 2)
    assert measure_retrieval(Echo(lambda prompt: looked_up(prompt)[:3]), tasks).accuracy == 0
    assert measure_retrieval(Echo(lambda prompt: [*looked_up(prompt), 3]), tasks).accuracy == 1


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 tasks, 8"):
        measure_retrieval(Echo(looked_up), [])
    with pytest.raises(ConfigError, match="1 tasks, 0"):
        measure_retrieval(Echo(looked_up), [Task((1,), (2,), 0)], 0)
    with pytest.raises(ConfigError, match="empty"):
        measure_retrieval(Echo(looked_up), [Task((1,), (), 0)])
    with pytest.raises(ConfigError, match="8 needles need 43 to 1024 tokens, not 42"):
        retrieval_tasks(42)
    with pytest.raises(ConfigError, match="not 1025"):
        retrieval_tasks(1025)
    with pytest.raises(ConfigError, match="1 to 16, not 17"):
        retrieval_tasks(needles=17)
    with pytest.raises(ConfigError, match=r"0 to 1, not \[-0\.1\]"):
        retrieval_tasks(depths=[-0.1])


def test_tasks_of_text_with_a_real_tokenizer() -> None:
    from transformers import AutoTokenizer

    from hf_accel.assets import demo_path

    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    needle, question, answer = "\ncode = 4821\n", "\ncode =", " 4821"
    task = text_task(tokenizer, "def run(self):\n    return 1\n", needle, question, answer, 200, 0.5)
    assert len(task.prompt) == 200
    text = tokenizer.decode(task.prompt)
    assert text.count(needle) == 1
    assert text.endswith(question)
    assert tokenizer.decode(task.expected) == answer
    assert 60 < len(tokenizer(text.split(needle)[0])["input_ids"]) < 140
    with pytest.raises(ConfigError, match="12 tokens do not hold"):
        text_task(tokenizer, "x", needle * 4, question, answer, 12, 0.5)
    with pytest.raises(ConfigError, match="share a token"):
        text_task(tokenizer, "x", needle, "\nreturn sel", "f", 100, 0.5)


def test_the_embedded_model_is_small_and_retrieves() -> None:
    assert sum(path.stat().st_size for path in retrieval_path().iterdir()) < 300_000
    for tokens in (128, 512, 1024):
        found = measure_retrieval(model(), retrieval_tasks(tokens, repeats=4, seed=5), batch_size=10)
        assert found.accuracy >= 0.95, f"{tokens} tokens: {found}"


def test_padded_batches_retrieve_too() -> None:
    tasks = [task for tokens in (100, 300, 200) for task in retrieval_tasks(tokens, (0.2, 0.8), 2, seed=6)]
    assert measure_retrieval(model(), tasks, batch_size=12).accuracy >= 0.9


def test_retrieval_is_of_the_context_and_not_learned_by_heart() -> None:
    tasks = retrieval_tasks(256, (0.3,), 16, seed=7)
    places = [task.prompt.index(task.prompt[-1]) for task in tasks]
    blind = [
        Task((*t.prompt[:p], *[FILLER.start] * 5, *t.prompt[p + 5 :]), t.expected, 0.3) for t, p in zip(tasks, places)
    ]
    assert measure_retrieval(model(), tasks, 16).accuracy >= 0.9
    assert measure_retrieval(model(), blind, 16).accuracy == 0


def test_weights_of_a_model_are_those_it_computes() -> None:
    eager = retrieval_model()
    eager.set_attn_implementation("eager")
    ids = torch.tensor([task.prompt for task in retrieval_tasks(128, (0.5,), 2)])
    with torch.no_grad():
        _, cached, queries = prefill(eager, ids)
        expected = eager(ids, output_attentions=True).attentions
    visible = torch.ones(2, 128, 128, dtype=torch.bool).tril()
    for layer, query, weights in zip(cached.layers, queries, expected):
        found = attention_weights(query, layer.keys, query.shape[-1] ** -0.5, visible)
        torch.testing.assert_close(found.flatten(1, 2), weights, atol=1e-5, rtol=1e-4)


def test_a_cache_that_is_not_cut_answers_as_stock() -> None:
    for method in ("streaming", "snapkv", "h2o", "tova", "key-norm"):
        assert accuracy(method, 1.0) >= 0.95


@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0])
def test_snapkv_keeps_needles_that_streaming_loses(ratio: float) -> None:
    assert accuracy("snapkv", ratio) >= 0.9
    assert accuracy("streaming", ratio) <= (0.4 if ratio == 2 else 0.05)  # at depth 0.7 half a cache has it still


def test_pooling_keeps_the_rest_of_an_answer_whose_beginning_is_looked_at() -> None:
    assert accuracy("snapkv", 8.0, kernel_size=1) < accuracy("snapkv", 8.0, kernel_size=7) - 0.3
