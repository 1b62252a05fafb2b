"""Wrappers keep working: PEFT adapters put on before and after, pipelines, calls of a compiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import exact
from comparison import optimised
from fingerprint import changes, fingerprint
from models import FEW, NAMES, build, padded, prompt
from texts import tokenizer
from transformers import pipeline

import hf_accel
from hf_accel import DecoderBlockConfig, NativeLinearConfig, SharedProjectionConfig

# peft 0.21 asks transformers 5.23 for an attribute under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
DEFAULTS = {"max_new_tokens": 16, "do_sample": False}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj", "down_proj"], "gpt_neox": ["query_key_value"]}


def text(model: Any) -> torch.Tensor:
    return model.generate(**padded([4, 9]), **DEFAULTS)


def add_adapter(model: Any, name: str) -> Any:
    """Wrap `model` by PEFT with one adapter that changes the text."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=TARGETS.get(name, ["q_proj", "v_proj"]), task_type="CAUSAL_LM"
    )
    if name == "deepseek_v3":
        config.target_modules = {"kv_b_proj", "o_proj"}
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@pytest.mark.peft
@pytest.mark.parametrize("name", NAMES)
def test_adapter_before_optimising(name: str) -> None:
    stock, patched = add_adapter(build(name), name), add_adapter(build(name), name)
    expected = text(stock)
    with stock.disable_adapter():
        bare = text(stock)
    assert not torch.equal(expected, bare)
    text(patched)
    before = fingerprint(patched.get_base_model())
    assert hf_accel.optimize(patched, exact(patched)) is patched
    assert torch.equal(text(patched), expected)
    with patched.disable_adapter():
        assert torch.equal(text(patched), bare)
    assert torch.equal(text(patched), expected)
    assert hf_accel.report(patched).to_dict()["calls"]["served"] == 3
    hf_accel.restore(patched)
    assert not changes(before, fingerprint(patched.get_base_model()))
    assert torch.equal(text(patched), expected)


@pytest.mark.peft
@pytest.mark.parametrize("name", NAMES)
def test_adapter_after_optimising(name: str) -> None:
    stock = add_adapter(build(name), name)
    expected = text(stock)
    base = optimised(build(name))
    bare = text(base)
    wrapped = add_adapter(base, name)
    assert torch.equal(text(wrapped), expected)
    with wrapped.disable_adapter():
        assert torch.equal(text(wrapped), bare)
    merged = wrapped.merge_and_unload()
    assert torch.equal(text(merged), text(stock.merge_and_unload()))
    hf_accel.restore(merged)
    assert torch.equal(text(merged), expected)


@pytest.mark.peft
def test_adapter_over_shared_projections() -> None:
    stock = add_adapter(build("qwen2"), "qwen2")
    base = build("qwen2")
    hf_accel.optimize(base, [SharedProjectionConfig(), *exact(base, NativeLinearConfig, SharedProjectionConfig)])
    wrapped = add_adapter(base, "qwen2")
    assert torch.equal(text(wrapped), text(stock))


@pytest.mark.peft
def test_transformers_own_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    # transformers 5.24 asks for a peft that is yet to be released; stock and optimised are compared under any
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0")
    texts = []
    for model in (build("llama"), optimised(build("llama"))):
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        with_adapter = text(model)
        model.disable_adapters()
        texts.append((with_adapter.tolist(), text(model).tolist()))
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize("name", FEW)
def test_pipeline(name: str) -> None:
    words = [tokenizer().decode(prompt(tokens=5)[0]), tokenizer().decode(prompt(tokens=9, seed=4)[0])]

    def write(model: Any, wrapped: bool = False) -> Any:
        made = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
        if wrapped:
            assert hf_accel.optimize(made, exact(made)) is made
        return [made(words, batch_size=2, **DEFAULTS), made(words[0], return_full_text=False, **DEFAULTS)]

    expected = write(build(name))
    assert write(optimised(build(name))) == expected
    model = build(name)
    assert write(model, wrapped=True) == expected
    assert hf_accel.report(model).to_dict()["calls"]["served"] > 0
    hf_accel.restore(model)


def test_native_layers_serve_a_plain_model() -> None:
    """The counterpart of every test above: without a wrapper the native call is what runs."""
    model = build("llama")
    hf_accel.optimize(model, exact(model))
    if DecoderBlockConfig not in {type(step.config) for step in hf_accel.report(model).applied}:
        pytest.skip("the native library is not there")
    text(model)
    layer = model.model.layers[0]
    calls = []
    kernel = layer.step.kernel
    layer.step.kernel = lambda *args: (calls.append(args[0].shape), kernel(*args))[1]
    text(model)
    assert len(calls) == 15, "every step after the prompt of 2 x 9 rows"


def test_a_device_map_with_one_device_is_not_split() -> None:
    from accelerate import dispatch_model

    model = build("llama")
    expected = model.generate(prompt(), max_new_tokens=8, do_sample=False)
    for hooks in (False, True):
        placed = dispatch_model(build("llama"), {"": "cpu"}, main_device="cpu", force_hooks=hooks)
        hf_accel.optimize(placed)
        assert torch.equal(placed.generate(prompt(), max_new_tokens=8, do_sample=False), expected)
        hf_accel.restore(placed)


def test_what_torch_compile_returned_is_refused_with_the_order() -> None:
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"Optimise first, compile after"):
        hf_accel.optimize(torch.compile(build("llama")))


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_peft_are_honoured_and_named(kind: str) -> None:
    """Keys and values of the prompt depend on them, and columns of the cache are counted from the first of them."""
    import peft

    model = peft.get_peft_model(build("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.7)
    inputs = padded([70, 90])
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(model.get_base_model().generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    hf_accel.optimize(model, exact(model.get_base_model(), speculates=True))
    reuse = hf_accel.KVCacheConfig(prefix_reuse=True)
    for keywords in ({}, {"kv_cache": reuse}, {"kv_cache": reuse}, {"speculative": "lookup"}):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **keywords), expected), keywords
    found = hf_accel.report(model)
    assert "peft's virtual tokens" in str(found.kv_cache)
    assert "peft's virtual tokens" in str(found.speculation)
