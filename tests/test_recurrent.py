"""Models whose recurrent mixers take a token natively write what they write by transformers' own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import build, padded, prompt
from recurrent_models import FEW, NAMES, recurrent
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import hf_accel
from hf_accel.core.drift import CACHE
from hf_accel.kernels.native import library
from hf_accel.recurrent import patcher
from hf_accel.recurrent.mixers import mixers_of
from hf_accel.recurrent.step import MixerStep, NativeMixer, cache_keyword

pytestmark = pytest.mark.native
NATIVE = [hf_accel.RecurrentStepConfig()]
EVERYTHING = [hf_accel.NativeLinearConfig(), *NATIVE, hf_accel.KVCacheConfig(), hf_accel.DecodingConfig()]
TOKENS = 40


@pytest.fixture(autouse=True)
def _without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patcher, "share_of_time", lambda mixer, form: 0.0)


def watched_steps(patch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that will say of every single token of a mixer whether it was taken natively."""
    found: list[bool] = []
    right = MixerStep.output

    def output(self: Any, module: Any, hidden: Tensor, kwargs: Any) -> Any:
        result = right(self, module, hidden, kwargs)
        if hidden.shape[1] == 1:
            found.append(result is not None)
        return result

    patch.setattr(MixerStep, "output", output)
    return found


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Say of every single token of a mixer whether it was taken natively."""
    return watched_steps(monkeypatch)


def greedy(model: PreTrainedModel, inputs: Any = None, tokens: int = TOKENS, **options: Any) -> Any:
    inputs = {"input_ids": prompt()} if inputs is None else inputs
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)


def texts(model: PreTrainedModel, tokens: int = 14) -> list[Tensor]:
    """Return greedy text of one prompt and of a padded batch, and sampled text."""
    torch.manual_seed(0)
    batch = padded([3, 9, 6])
    sampled = model.generate(**batch, max_new_tokens=8, do_sample=True, top_p=0.9)
    return [greedy(model, tokens=tokens), greedy(model, batch, 10), sampled]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def states_of(cache: Any) -> list[Tensor]:
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    held = [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]
    return [state for state in held if state is not None]


@pytest.mark.parametrize("name", NAMES)
def test_text_is_stocks(name: str, served: list[bool]) -> None:
    model = recurrent(name)
    before, classes = texts(model, TOKENS), [type(module) for module in model.modules()]
    hf_accel.optimize(model, NATIVE)
    assert not hf_accel.report(model).skipped
    assert equal(texts(model, TOKENS), before)
    assert served
    assert all(served)
    hf_accel.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(greedy(model), before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_states_of_16_bits_are_near_stocks(name: str, dtype: torch.dtype, served: list[bool]) -> None:
    model = recurrent(name, dtype)
    ids = greedy(model, tokens=9)  # the text is given, so that one token that ties changes nothing

    def states() -> list[Tensor]:
        with torch.no_grad():
            cache = model(input_ids=ids[:, :10], use_cache=True)[CACHE]
            for token in ids[:, 10:].split(1, dim=1):
                cache = model(input_ids=token, use_cache=True, **{CACHE: cache})[CACHE]
        return states_of(cache)

    expected = states()
    hf_accel.optimize(model, NATIVE)
    for found, stocks in zip(states(), expected, strict=True):
        assert found.dtype is stocks.dtype
        assert float((found.double() - stocks.double()).norm() / stocks.double().norm()) < 4e-2
    assert all(served)


@pytest.mark.parametrize("name", FEW)
def test_all_steps_together(name: str, served: list[bool]) -> None:
    model = recurrent(name)
    before = texts(model)
    hf_accel.optimize(model, EVERYTHING)
    assert equal(texts(model), before)
    assert served
    assert all(served)


@pytest.mark.parametrize("name", FEW)
def test_prompts_go_on_from_the_states(name: str, served: list[bool]) -> None:
    model, more = recurrent(name), prompt(tokens=5, seed=9)

    def conversation() -> tuple[Any, Any, list[Tensor]]:
        first = greedy(model, tokens=9, return_dict_in_generate=True)
        ids, cache = torch.cat([first.sequences, more], dim=1), first[CACHE]
        second = greedy(model, {"input_ids": ids, CACHE: cache}, tokens=9)
        return first.sequences, second, states_of(cache)

    expected = conversation()
    hf_accel.optimize(model, NATIVE)
    served.clear()
    found = conversation()
    assert all(served)
    assert equal(list(found[:2]), list(expected[:2]))
    for state, stocks in zip(found[2], expected[2], strict=True):
        assert torch.allclose(state, stocks, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FEW)
def test_copied_states_take_steps_back(name: str) -> None:
    model = recurrent(name)
    hf_accel.optimize(model, NATIVE)
    with torch.no_grad():
        cache = model(input_ids=prompt(), use_cache=True)[CACHE]
        kept, tokens = copy.deepcopy(cache), prompt(tokens=4, seed=5).split(1, dim=1)
        once = [model(input_ids=token, **{CACHE: cache}).logits for token in tokens]
        again = [model(input_ids=token, **{CACHE: kept}).logits for token in tokens]
    assert equal(again, once)


@pytest.mark.parametrize("name", FEW)
def test_beams_reorder_the_states(name: str, served: list[bool]) -> None:
    model = recurrent(name)
    before = greedy(model, {"input_ids": prompt(2)}, 12, num_beams=3)
    hf_accel.optimize(model, NATIVE)
    assert torch.equal(greedy(model, {"input_ids": prompt(2)}, 12, num_beams=3), before)
    assert all(served)


@pytest.mark.parametrize("name", FEW)
def test_threads_share_the_work(name: str) -> None:
    model = recurrent(name)
    hf_accel.optimize(model, NATIVE)
    before, threads = texts(model), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert equal(texts(model), before)
    finally:
        torch.set_num_threads(threads)


def test_calls_that_are_no_plain_step_run_as_they_were(served: list[bool]) -> None:
    model = recurrent("qwen3_next")
    mixer = next(iter(mixers_of(model).values()))
    keyword = cache_keyword(mixer)
    hidden = torch.randn(2, 1, 48)

    def cache_after_a_prompt() -> Any:
        with torch.no_grad():
            return model(input_ids=prompt(2), use_cache=True)[CACHE]

    def outputs() -> list[Tensor]:
        mask, half = torch.tensor([[1], [0]]), torch.tensor([[1], [1]])
        recording = cache_after_a_prompt()
        recording.layers[0].activate_past_recording()
        with torch.no_grad():
            return [
                mixer(hidden, **{keyword: cache_after_a_prompt()}, attention_mask=mask),
                mixer(hidden),
                mixer(hidden, cache_after_a_prompt()),
                mixer(hidden, **{keyword: recording}),
                mixer(hidden, **{keyword: cache_after_a_prompt()}, attention_mask=half),
            ]

    expected = outputs()
    hf_accel.optimize(model, NATIVE)
    found = outputs()
    assert equal(found[:4], expected[:4])
    assert served == [False, False, False, True]  # the third gives its cache by position
    assert torch.allclose(found[4], expected[4], rtol=1e-4, atol=1e-5)
    mixer(hidden, **{keyword: cache_after_a_prompt()})  # with gradients
    assert served[-1] is False


def test_packed_projections_are_called_as_they_are(served: list[bool]) -> None:
    weights = [hf_accel.WeightOnlyConfig(bits=8)]
    model, packed = recurrent("granite"), recurrent("granite")
    hf_accel.optimize(packed, weights)
    hf_accel.optimize(model, [*weights, *NATIVE])
    assert equal(texts(model), texts(packed))
    assert all(served)


def test_copies_are_stock() -> None:
    model = recurrent("lfm2")
    before = greedy(model)
    hf_accel.optimize(model, NATIVE)
    twin = copy.deepcopy(model)
    assert not [module for module in twin.modules() if isinstance(module, NativeMixer)]
    assert torch.equal(greedy(twin), before)


def test_a_model_without_mixers_is_refused_unchanged() -> None:
    model = build("llama")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(hf_accel.UnsupportedModelError, match="no recurrent mixers"):
        hf_accel.optimize(model, NATIVE)
    assert [type(module) for module in model.modules()] == classes


def test_what_a_generation_config_asks_for_does_not_disturb_the_audit() -> None:
    model = recurrent("lfm2")
    before = greedy(model)
    model.generation_config.num_return_sequences = 2
    model.generation_config.max_length = 5
    hf_accel.optimize(model, NATIVE)
    model.generation_config.num_return_sequences = 1
    assert torch.equal(greedy(model), before)


def test_the_library_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_available", lambda: False)
    with pytest.raises(hf_accel.UnsupportedModelError, match="native library is not there"):
        hf_accel.optimize(recurrent("lfm2"), NATIVE)
