"""A token of each of several texts in one native call for the whole model: every text gets what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from merging import merged, own_cache
from models import build, padded, prompt, stock
from test_merged_rows import LENGTHS, begun, tokens_of
from test_whole_steps import NEW, SERVED, served, whole

import hf_accel
from hf_accel import DecoderBlockConfig, DecodingConfig, KVCacheConfig, WeightOnlyConfig
from hf_accel.cache.codec import AS_IS, Codec
from hf_accel.core.calls.call import IN_PROGRESS, Request
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.drift import CACHE
from hf_accel.kernels import native
from hf_accel.layers.stepping import StepRunner

pytestmark = pytest.mark.native


def of(rows: int, **arguments: Any) -> Any:
    """A call on so many prompts."""
    return lambda model: model.generate(prompt(rows, 9), **({"max_new_tokens": NEW, "do_sample": False} | arguments))


@pytest.fixture
def asked() -> Iterator[None]:
    """A call of `generate` is in progress."""
    token = IN_PROGRESS.set(Request())
    yield
    IN_PROGRESS.reset(token)


@pytest.mark.parametrize("name", SERVED)
def test_batches_get_stocks_texts(name: str) -> None:
    model, runner = whole(name)
    for call in (of(2), of(7), of(3, do_sample=True)):
        compared = partial(assert_equal_calls, stock(name), model, call)
        assert served(runner, compared) == NEW - 1


CALLS: dict[str, tuple[Any, bool]] = {
    "ends of text": (of(5, eos_token_id=list(range(20, 50)), pad_token_id=3, max_new_tokens=30), True),
    "scores": (of(2, return_dict_in_generate=True, output_logits=True), True),
    "as many rows as are served": (of(16), True),
    "a row more": (of(17), False),
    "padded rows": (lambda model: model.generate(**padded([3, 11, 8]), max_new_tokens=NEW), False),
    "a mask that hides nothing": (lambda model: model.generate(**padded([11, 11]), max_new_tokens=NEW), True),
}


@pytest.mark.parametrize("case", CALLS)
def test_which_batches_are_served(case: str) -> None:
    call, is_served = CALLS[case]
    for name in ("llama", "gemma3"):
        model, runner = whole(name)
        count = served(runner, lambda: assert_equal_calls(stock(name), model, call))  # noqa: B023
        assert bool(count) == is_served


def test_tokens_of_a_batch_follow_on_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _runner = whole("llama")
    followed: list[Any] = []
    follow = StepRunner.follow
    monkeypatch.setattr(StepRunner, "follow", lambda *given: followed.append(follow(*given)) or followed[-1])
    assert_equal_calls(stock("llama"), model, of(3))
    assert sum(found is not None for found in followed) == NEW - 2  # all but the prompt's and the first step's
    assert all(found.shape == (3, 1) for found in followed if found is not None)


def test_more_positions_than_were_known_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_accel.layers.step_guard.POSITIONS", 16)
    for name in ("llama", "gpt2"):
        model, runner = whole(name)
        call = of(2, max_new_tokens=40)
        assert served(runner, lambda: assert_equal_calls(stock(name), model, call)) == 39  # noqa: B023


def packed(name: str, bits: int, dtype: torch.dtype) -> tuple[Any, StepRunner]:
    steps = [WeightOnlyConfig(bits=bits), DecoderBlockConfig(max_rows=40), KVCacheConfig(), DecodingConfig()]
    model = hf_accel.optimize(build(name, dtype), steps)
    host: Any = host_of(model)
    return model, host.doors[Door.FORWARD]


def made(name: str, bits: int | None, dtype: torch.dtype) -> tuple[Any, StepRunner]:
    if bits is not None:
        return packed(name, bits, dtype)
    model, runner = whole(name, dtype)
    for step in runner.guard.steps:
        step.extent = type(step.extent)(40, 40)
    return model, runner


def step(runner: StepRunner, ids: torch.Tensor, positions: torch.Tensor | None, cache: Any, **more: Any) -> Any:
    """The outputs of a step, which must be a native call."""
    before = runner.served
    found = runner(input_ids=ids, position_ids=positions, use_cache=True, return_dict=True, **{CACHE: cache}, **more)
    assert runner.served == before + 1
    assert torch.equal(found.choices, found.logits.float().argmax(-1))
    return found.logits


KINDS: list[tuple[str, int | None, torch.dtype, int | None]] = [
    ("llama", None, torch.float32, None), ("llama", None, torch.bfloat16, 8), ("llama", 8, torch.float32, None),
    ("mistral", 4, torch.bfloat16, None), ("gemma2", None, torch.bfloat16, None), ("gemma3", None, torch.float32, 4),
    ("gpt2", None, torch.float16, None), ("opt", None, torch.float32, None), ("qwen2", 8, torch.bfloat16, 8),
]  # fmt: skip


@pytest.mark.parametrize("name, bits, dtype, cached", KINDS)
@pytest.mark.parametrize("count", [1, 2, 8, 17, 40])
@torch.no_grad()
def test_rows_in_caches_of_their_own(
    asked: None, name: str, bits: int | None, dtype: torch.dtype, cached: int | None, count: int
) -> None:
    codec = AS_IS if cached is None else Codec(cached)
    model, runner = made(name, bits, dtype)
    lengths = (LENGTHS * 5)[:count]
    together, alone = begun(model, lengths, codec), begun(model, lengths, codec)
    nothing = torch.zeros(count, 1, dtype=torch.long)  # a mask that stands for nothing
    for turn in range(2):
        ids, positions = tokens_of(turn, count), torch.tensor(lengths)[:, None] + turn
        found = step(runner, ids, positions, merged(together), attention_mask=nothing if turn else None)
        assert found.shape == (count, 1, runner.guard.step.vocabulary)
        for row, cache in enumerate(alone):
            expected = step(runner, ids[row : row + 1], positions[row : row + 1], cache)
            assert torch.equal(found[row : row + 1], expected) or native.status().isa == "amx"
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("name, bits, dtype, cached", KINDS)
@torch.no_grad()
def test_rows_of_one_buffer(asked: None, name: str, bits: int | None, dtype: torch.dtype, cached: int | None) -> None:
    codec = AS_IS if cached is None else Codec(cached)
    model, runner = made(name, bits, dtype)
    ids = prompt(6, 12)
    together, alone = own_cache(model, codec), [own_cache(model, codec) for _ in ids]
    model(ids, use_cache=True, **{CACHE: together})
    for row, cache in enumerate(alone):
        model(ids[row : row + 1], use_cache=True, **{CACHE: cache})
        for mine, all_of_them in zip(cache.layers, together.layers, strict=True):
            mine.buffers.keys.copy_(all_of_them.buffers.keys[row : row + 1])  # prompts of many rows sum in other orders
            mine.buffers.values.copy_(all_of_them.buffers.values[row : row + 1])
    for turn in range(3):
        new = tokens_of(turn, 6)
        found = step(runner, new, None, together)
        for row, cache in enumerate(alone):
            expected = step(runner, new[row : row + 1], None, cache)
            assert torch.equal(found[row : row + 1], expected) or native.status().isa == "amx"
    assert runner.follow(together) is None  # another cache came between
    step(runner, new, None, together)
    assert runner.follow(together).shape == (6, 1)


@pytest.mark.parametrize("name, bits, dtype, cached", KINDS)
@torch.no_grad()
def test_layers_one_by_one_give_the_same(
    asked: None, name: str, bits: int | None, dtype: torch.dtype, cached: int | None
) -> None:
    """What they write to the last bit; torch sums the last norm in another order, so that logits may differ by that."""
    model, runner = made(name, bits, dtype)
    lengths = LENGTHS[:6]
    ours, theirs = (begun(model, lengths, AS_IS if cached is None else Codec(cached)) for _ in range(2))
    for turn in range(2):
        ids, positions = tokens_of(turn, 6), torch.tensor(lengths)[:, None] + turn
        found = step(runner, ids, positions, merged(ours))
        expected = model(ids, position_ids=positions, use_cache=True, **{CACHE: merged(theirs)}).logits
        assert float((found - expected).norm() / expected.norm()) < (1e-3 if dtype is torch.float16 else 1e-4)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(mine.keys, its.keys) for mine, its in zip(one.layers, other.layers, strict=True))


@torch.no_grad()
def test_rows_in_caches_of_their_own_do_not_follow(asked: None) -> None:
    """Whoever merged them may have others next."""
    model, runner = made("llama", None, torch.float32)
    cache = merged(begun(model, (5, 9), AS_IS))
    step(runner, tokens_of(0, 2), torch.tensor([[5], [9]]), cache)
    assert runner.follow(cache) is None


def test_as_many_positions_as_rows() -> None:
    _, runner = whole("llama")
    found: Any = runner.guard.step
    memory = native.StepMemory(len(found.blocks), found.hidden, 2)
    with pytest.raises(ValueError, match="a step of 2 rows takes as many positions, got 1"):
        found(memory, 3)
