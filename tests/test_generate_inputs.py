"""Inputs of every kind: caches of the caller's, embeddings, masks with holes, positions, model keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls, assert_same_cache, optimised
from models import FEW, NAMES, TINY, build, padded, prompt
from transformers import DynamicCache, GenerationConfig, StaticCache

import hf_accel
from hf_accel.core.drift import CACHE

HOLES = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0],
    ]
)


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, Any]]:
    built: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in built:
            stock = build(name)
            built[name] = (stock, optimised(stock))
        return built[name]

    return get


def served(model: Any) -> int:
    return hf_accel.report(model).to_dict()["calls"]["served"]


def generate(ids: torch.Tensor | None, **arguments: Any) -> Callable[[Any], Any]:
    arguments.setdefault("max_new_tokens", 20)
    return lambda model: model.generate(ids, **arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [False, True])
def test_masks_with_holes_and_right_padding(name: str, sampling: bool, models: Any) -> None:
    ids = prompt(batch=4)
    call = generate(ids, attention_mask=HOLES, do_sample=sampling, return_dict_in_generate=True, output_logits=True)
    assert_equal_calls(*models(name), call)
    assert_equal_calls(*models(name), generate(ids, attention_mask=HOLES, num_beams=2, max_new_tokens=8))
    assert_equal_calls(*models(name), generate(ids, attention_mask=HOLES, use_cache=False, max_new_tokens=6))


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_mask_of_one_row(name: str, models: Any) -> None:
    for row in HOLES:
        assert_equal_calls(*models(name), generate(prompt(), attention_mask=row[None], do_sample=False))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_embeds_return_no_prompt(name: str, models: Any) -> None:
    stock, patched = models(name)
    embeddings = stock.get_input_embeddings()(padded([4, 11])["input_ids"]).detach()
    mask = padded([4, 11])["attention_mask"]
    call = generate(None, inputs_embeds=embeddings, attention_mask=mask, do_sample=False)
    assert assert_equal_calls(stock, patched, call).shape == (2, 20)
    ids = padded([4, 11])["input_ids"]
    assert_equal_calls(stock, patched, generate(ids, inputs_embeds=embeddings, attention_mask=mask, do_sample=True))
    assert_equal_calls(stock, patched, generate(None, inputs_embeds=embeddings[1:], max_new_tokens=12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["bare", "configured"])
def test_a_dynamic_cache_of_the_callers_is_filled_in_place(name: str, kind: str, models: Any) -> None:
    stock, patched = models(name)
    caches, texts = [], []
    for model in (stock, patched):
        cache = DynamicCache() if kind == "bare" else DynamicCache(config=model.config)
        classes = [type(layer) for layer in cache.layers]
        ids = model.generate(prompt(), **{CACHE: cache}, max_new_tokens=9, do_sample=False)
        assert int(cache.get_seq_length()) == ids.shape[1] - 1
        assert [type(layer) for layer in cache.layers][: len(classes)] == classes, "the caller's layers were exchanged"
        more = torch.cat([ids, prompt(seed=9)], dim=1)  # the conversation goes on with the whole text
        ids = model.generate(more, **{CACHE: cache}, max_new_tokens=12, do_sample=False)
        out = model.generate(torch.cat([ids, prompt(seed=10)[:, :1]], dim=1), **{CACHE: cache},
                             max_new_tokens=3, do_sample=False, return_dict_in_generate=True)  # fmt: skip
        assert out[CACHE] is cache
        caches.append(cache)
        texts.append(out.sequences)
    assert torch.equal(*texts)
    assert_same_cache(*caches)


@pytest.mark.parametrize("name", NAMES)
def test_a_returned_cache_continues_on_either_model(name: str, models: Any) -> None:
    """What an optimised call returns is a cache that a stock model goes on with, and the other way round."""
    stock, patched = models(name)
    results = []
    for first, second in ((stock, stock), (patched, patched), (patched, stock), (stock, patched)):
        out = first.generate(prompt(), max_new_tokens=14, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([out.sequences, prompt(seed=5)], dim=1)
        again = second.generate(more, **{CACHE: out[CACHE]}, max_new_tokens=9, do_sample=False)
        results.append(again)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_of_the_callers(name: str, models: Any) -> None:
    stock, patched = models(name)

    def call(model: Any) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=64)
        out = model.generate(prompt(), **{CACHE: cache}, do_sample=False, max_new_tokens=12,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
        more = torch.cat([out.sequences, prompt(seed=9)[:, :3]], dim=1)
        return out.sequences, model.generate(more, **{CACHE: cache}, do_sample=False, max_new_tokens=5)

    assert_equal_calls(stock, patched, call)


@pytest.mark.parametrize("name", NAMES)
def test_cache_implementations(name: str, models: Any) -> None:
    stock, patched = models(name)
    before = served(patched)
    for implementation, config in (("static", None), ("dynamic", None), ("quantized", {"backend": "fp8"})):
        call = generate(prompt(), cache_implementation=implementation, cache_config=config, do_sample=False)
        try:
            call(stock)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            with pytest.raises(type(error)):
                call(patched)
            continue
        assert_equal_calls(stock, patched, call)
    assert served(patched) > before


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_the_callers(name: str, models: Any) -> None:
    positions = torch.arange(11)[None] * 2 + 1
    for arguments in ({}, {"do_sample": True}, {"use_cache": False, "max_new_tokens": 4}):
        call = generate(
            prompt(), position_ids=positions, attention_mask=torch.ones(1, 11, dtype=torch.long), **arguments
        )
        assert_equal_calls(*models(name), call)


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].keyword])
@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_model_keywords_reach_every_forward(name: str, how: dict[str, Any], models: Any) -> None:
    stock, patched = models(name)
    types = torch.where(torch.arange(11) < 6, 9, 20)[None]
    call = generate(prompt(), **{str(TINY[name].keyword): types}, **how)
    with_keyword = assert_equal_calls(stock, patched, call)
    assert not torch.equal(with_keyword, stock.generate(prompt(), max_new_tokens=20, **how))


@pytest.mark.parametrize("name", FEW)
def test_a_generation_config_object(name: str, models: Any) -> None:
    config = GenerationConfig(max_new_tokens=15, do_sample=True, top_k=7, temperature=0.8, pad_token_id=0)
    assert_equal_calls(*models(name), generate(prompt(), generation_config=config))
    assert_equal_calls(*models(name), generate(prompt(), generation_config=config, do_sample=False, max_new_tokens=3))


@pytest.mark.parametrize("name", FEW)
def test_no_inputs_at_all(name: str, models: Any) -> None:
    assert_equal_calls(*models(name), generate(None, do_sample=False))


@pytest.mark.parametrize("name", NAMES)
def test_plain_forwards(name: str, models: Any) -> None:
    """Forward passes outside `generate`: with and without a cache, gradients, hidden states, several tokens at once."""

    def call(model: Any) -> Any:
        ids = prompt(batch=2)
        found = [model(ids, output_hidden_states=True).hidden_states]
        with torch.no_grad():
            first = model(ids[:, :6], use_cache=True, output_hidden_states=True)
            verify = model(ids[:, 6:9], **{CACHE: first[CACHE]}, output_hidden_states=True)
            last = model(ids[:, 9:10], **{CACHE: first[CACHE]}, logits_to_keep=1)
            short = model(ids[:1, :3], use_cache=False, labels=ids[:1, :3])
        return [*found, first.hidden_states, verify.logits, verify.hidden_states, last.logits, short.loss]

    assert_equal_calls(*models(name), call)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, models: Any) -> None:
    def call(model: Any) -> Any:
        model.zero_grad()
        model(prompt(batch=1, tokens=5), labels=prompt(batch=1, tokens=5)).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    stock, patched = models(name)
    assert_equal_calls(stock, patched, call)
    stock.zero_grad(set_to_none=True)
    patched.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gemma2", "gemma3")])  # they want two masks
def test_a_custom_four_dimensional_mask(name: str, models: Any) -> None:
    """A 4-D mask is used as it is, over a short query and a filled cache."""
    visible = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    visible[..., 0, 7] = False
    visible[..., 1, 2:5] = False

    def call(model: Any) -> Any:
        with torch.no_grad():
            first = model(prompt()[:, :6], **{CACHE: DynamicCache()}, use_cache=True)
            mask = visible if model.config._attn_implementation != "eager" else torch.where(visible, 0.0, -1e9)
            return model(prompt()[:, 6:8], **{CACHE: first[CACHE]}, attention_mask=mask,
                         position_ids=torch.tensor([[6, 7]])).logits  # fmt: skip

    assert_equal_calls(*models(name), call)


@pytest.mark.parametrize("name", FEW)
def test_inference_mode_and_back(name: str, models: Any) -> None:
    stock, patched = models(name)

    def call(model: Any) -> Any:
        with torch.inference_mode():
            out = model.generate(prompt(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
            text = out.sequences.tolist()
        again = model.generate(prompt(), max_new_tokens=12, do_sample=False)
        cache = out[CACHE]  # made of inference tensors, gone on with outside
        more = torch.cat([torch.tensor(text), prompt(seed=4)[:, :2]], dim=1)
        return text, again, model.generate(more, **{CACHE: cache}, max_new_tokens=5, do_sample=False)

    assert_equal_calls(stock, patched, call)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_begun_under_autocast_is_gone_on_with_outside(name: str) -> None:
    """Keys may be left in fp32 (rotary tables are) and values in bf16."""
    stock = build(name)

    def call(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            first = model.generate(prompt(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        begun = first[CACHE].layers[0]
        dtypes = [begun.keys.dtype, begun.values.dtype]
        more = torch.cat([first.sequences, prompt(seed=4)[:, :1]], dim=1)
        out = model.generate(more, **{CACHE: first[CACHE]}, max_new_tokens=12, do_sample=False,
                             return_dict_in_generate=True, output_logits=True)  # fmt: skip
        return dtypes, first.sequences, out

    assert_equal_calls(stock, optimised(stock), call)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", FEW)
def test_the_cache_goes_by_its_old_name_as_with_stock(name: str) -> None:
    stock = build(name)

    def call(model: Any) -> Any:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt()[:, :5], past_key_values=cache)
            step = model(prompt()[:, 5:6], past_key_values=cache, use_cache=True)
        out = model.generate(prompt(), past_key_values=cache, max_new_tokens=5, do_sample=False,
                             return_dict_in_generate=True)  # fmt: skip
        assert step.past_key_values is cache
        assert out.past_key_values is out[CACHE] is cache
        return step.logits, out

    assert_equal_calls(stock, optimised(stock), call)
