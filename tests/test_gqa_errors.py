"""What cannot be converted is refused in words that say what to do, and the model is bit for bit what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from heads import made, model_of
from models import SMALL, Tiny, build, padded, prompt
from quantized_files import saved
from test_quantized_peft import with_adapter
from transformers import AttentionInterface, AutoModelForCausalLM

import hf_accel
from hf_accel import ConfigError, ConflictError, DecodingConfig, GQAConfig, UnsupportedModelError, WeightOnlyConfig
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model.support import unwrap
from hf_accel.gqa import converting

IDS = prompt(16, 32)
Make = Callable[[], Any]


def llama(**values: Any) -> Any:
    return model_of(Tiny("llama", SMALL | {"num_key_value_heads": 4} | values))


def with_number(name: str, path: str, value: float) -> Any:
    """Return a model one of whose weights is no finite number."""
    model = build(name)
    with torch.no_grad():
        model.get_parameter(path).view(-1)[5] = value
    return model


def check_refused(
    model: Any, error: type[Exception], words: str, kv_heads: int = 1, *, in_place: bool = True, **options: Any
) -> None:
    """Check that both ways of converting refuse a model, which stays as it is; obstacles are of a plan's error."""
    inner = unwrap(model)
    before, state = fingerprint(inner), torch.get_rng_state()
    was_hosted = host_of(inner)
    options = {"calibration": IDS, "repair_steps": 2} | options
    with pytest.raises(error, match=words):
        hf_accel.convert_gqa(model, kv_heads, **options)
    assert not changes(before, fingerprint(inner))
    if in_place:
        for verb in (hf_accel.optimize, hf_accel.plan):
            with pytest.raises((error, UnsupportedModelError)) as raised:
                verb(model, GQAConfig(num_kv_heads=kv_heads, **options))
            assert isinstance(raised.value, hf_accel.HfAccelError)
            assert not changes(before, fingerprint(inner))
            assert host_of(inner) is was_hosted
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make, kv_heads, words",
    [
        (llama, 3, r"4 query heads cannot share 3 key/value heads; the number has to divide 4"),
        (llama, 4, r"4 key/value heads were asked for, and the model has 4; ask for fewer"),
        (llama, 8, r"8 key/value heads were asked for, and the model has 4; ask for fewer"),
        (lambda: build("qwen2"), 2, r"2 key/value heads were asked for, and the model has 2; ask for fewer"),
        (lambda: made("bigcode_one"), 1, r"the model has 1; ask for fewer"),
        (llama, 0, r"num_kv_heads is a whole number, at least 1; 0 was given"),
        (llama, -1, r"num_kv_heads is a whole number, at least 1; -1 was given"),
        (llama, True, r"num_kv_heads is a whole number, at least 1; True was given"),
        (llama, 2.0, r"num_kv_heads is a whole number, at least 1; 2\.0 was given"),
    ],
    ids=["no divisor", "as many", "more", "as many as few", "as one", "none", "negative", "bool", "float"],
)
def test_numbers_of_heads(make: Make, kv_heads: Any, words: str) -> None:
    check_refused(make(), ConfigError, words, kv_heads)


ARCHITECTURES: dict[str, tuple[Make, str]] = {
    "mla": (lambda: build("deepseek_v3"), r"one latent vector for all heads \(MLA\), which is small already"),
    "gpt2": (lambda: build("gpt2"), "Express it in another architecture first: gpt_bigcode"),
    "opt": (lambda: build("opt"), "Express it in another architecture first: gpt_bigcode"),
    "gpt_neox": (lambda: build("gpt_neox"), "another architecture first: phi or starcoder2 or nemotron"),
    "bloom": (lambda: made("bloom"), "There is no other architecture to express it in"),
    "olmo2": (lambda: made("olmo2"), r"in more than its projections: .*k_norm\.weight"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    make, words = ARCHITECTURES[name]
    check_refused(make(), UnsupportedModelError, words)


@pytest.mark.parametrize(
    "name, target, words",
    [
        ("gpt2", "phi", "A gpt2 model cannot be expressed as phi: it can be expressed as gpt_bigcode"),
        ("gpt2", "best", "cannot be expressed as best: it can be expressed as gpt_bigcode"),
        ("llama", "llama", "there is no other for it"),
    ],
)
def test_other_architectures(name: str, target: str, words: str) -> None:
    check_refused(build(name), UnsupportedModelError, words, in_place=False, architecture=target)


def test_heads_that_the_other_architecture_has_not() -> None:
    words = "gpt_bigcode cannot have 2 key/value heads: it has one, or as many as query heads, 4"
    check_refused(build("gpt2"), UnsupportedModelError, words, 2, in_place=False, architecture="gpt_bigcode")


SHORT = "their least squares need 40, a token for each input, and at least 8 rows"
TEXTS: dict[str, tuple[Any, str, str]] = {  # what is given; what convert_gqa says, what GQAConfig says
    "too few tokens": (prompt(8, 6), f"48 tokens leaves 36 .* {SHORT}", f"leaves 36 .* {SHORT}"),
    "too few rows": (prompt(2, 16), f"32 tokens leaves 0 .* {SHORT}", f"leaves 0 .* {SHORT}"),
    "one short row": (prompt(1, 100), f"100 tokens leaves 0 .* {SHORT}", f"leaves 0 .* {SHORT}"),
    "one token again and again": (
        torch.full((16, 32), 9),
        "span 1 directions, and a head has 10 numbers",
        "more varied",
    ),
    "ids out of the vocabulary": (IDS + 100, "outside the model's vocabulary of 128", "vocabulary of 128"),
    "negative ids": (IDS - 100, "outside the model's vocabulary of 128", "vocabulary of 128"),
    "ragged": (
        [[9, 10, 11], [9, 10]],
        f"5 tokens leaves 0 .* {SHORT}",
        "rows of several lengths. Give rows of one length",
    ),
    "numbers": (torch.rand(16, 32), r"token ids \[B, T\]", r"token ids \[B, T\]; texts are given to optimize or plan"),
    "a text": ("some text", "give the tokenizer, too", "texts are given to optimize or plan, with their tokenizer"),
    "padded": (padded([9, 20]), f"29 tokens leaves 0 .* {SHORT}", r"token ids \[B, T\]"),
    "nothing": (torch.empty(0, 32, dtype=torch.long), "Calibration has 0 tokens", r"shape \[0, 32\] was given"),
}


@pytest.mark.parametrize("title", TEXTS)
def test_calibration(title: str) -> None:
    given, words, of_the_config = TEXTS[title]
    model = build("llama")
    check_refused(model, ConfigError, words, in_place=False, calibration=given)
    before = fingerprint(model)
    for verb in (hf_accel.optimize, hf_accel.plan):
        with pytest.raises(ConfigError, match=of_the_config):
            verb(model, GQAConfig(num_kv_heads=1, calibration=given, repair_steps=2))
        assert not changes(before, fingerprint(model))
        assert host_of(model) is None


@pytest.mark.parametrize(
    "values, words",
    [
        ({"method": "best"}, "method is one of aligned, mean, first; 'best' was given"),
        ({"repair_steps": -1}, "repair_steps is a whole number, at least 0; -1 was given"),
        ({"repair_steps": 1.5}, "repair_steps is a whole number, at least 0; 1.5 was given"),
    ],
    ids=["method", "negative steps", "half steps"],
)
def test_values(values: dict[str, Any], words: str) -> None:
    check_refused(build("llama"), ConfigError, words, **values)


DAMAGED = {
    "keys": ("model.layers.1.self_attn.k_proj.weight", float("nan"), r"projections of model\.layers\.1\.self_attn"),
    "output": ("model.layers.2.self_attn.o_proj.weight", float("inf"), r"projections of model\.layers\.2\.self_attn"),
    "mlp": ("model.layers.0.mlp.down_proj.weight", float("nan"), r"model\.layers\.1\.self_attn gives NaN or infinite"),
    "norm": ("model.layers.0.input_layernorm.weight", float("nan"), r"layers\.0\.self_attn gives NaN or infinite"),
}


@pytest.mark.parametrize("place", DAMAGED)
def test_weights_that_are_no_numbers(place: str) -> None:
    path, value, words = DAMAGED[place]
    check_refused(with_number("llama", path, value), UnsupportedModelError, words)
    if "projections" in words:
        check_refused(with_number("llama", path, value), UnsupportedModelError, words, method="mean")


@pytest.mark.parametrize("config", [WeightOnlyConfig(bits=8), DecodingConfig()], ids=["quantized", "exact"])
def test_an_optimised_model(config: Any) -> None:
    model = hf_accel.optimize(build("llama"), config)
    expected = model.generate(prompt(), max_new_tokens=5, do_sample=False)
    check_refused(model, ConflictError, r"optimised.*Call hf_accel\.restore\(model\)")
    assert torch.equal(model.generate(prompt(), max_new_tokens=5, do_sample=False), expected)
    hf_accel.restore(model)
    assert hf_accel.convert_gqa(model, 1, method="first").config.num_key_value_heads == 1


@pytest.mark.compressed_tensors
def test_quantized_weights_of_a_file(tmp_path: Path) -> None:
    saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = "not a plain product in floating point .*convert before quantizing|it has parts whose meaning"
    with pytest.raises(UnsupportedModelError, match=words):
        hf_accel.convert_gqa(model, 1, calibration=IDS)
    with pytest.raises(UnsupportedModelError, match=words):
        hf_accel.optimize(model, GQAConfig(num_kv_heads=1, calibration=IDS))
    assert host_of(model) is None


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_in_attention() -> None:
    check_refused(with_adapter(build("llama"), "llama"), UnsupportedModelError, "merge adapters first")


def test_what_is_no_model() -> None:
    with pytest.raises(UnsupportedModelError, match="transformers models"):
        hf_accel.convert_gqa(torch.nn.Linear(2, 2), 1)


def test_attention_that_is_called_twice() -> None:
    model = build("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedModelError, match="is called 16 times in 8 forward passes"):
        hf_accel.convert_gqa(model, 1, calibration=IDS)


def test_values_that_are_changed_on_their_way() -> None:
    """Gemma 4 norms its values, without a weight that would show it."""

    def normed(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        value = value / value.norm(dim=-1, keepdim=True)
        return AttentionInterface._global_mapping["sdpa"](module, query, key, value, *rest, **options)

    AttentionInterface.register("normed_values", normed)
    try:
        model = build("llama")
        model.config._attn_implementation = "normed_values"
        check_refused(model, UnsupportedModelError, r"between the values of model\.layers\.0\.self_attn and its output")
    finally:
        del AttentionInterface._global_mapping["normed_values"]


def test_a_config_without_heads() -> None:
    model = model_of(Tiny("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}))
    check_refused(model, UnsupportedModelError, "num_attention_heads=None")


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_on_the_way(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the middle of a conversion, also after a layer that is done."""
    repair, calls = converting.repair, []

    def breaks(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > at:
            raise MemoryError("planted")
        return repair(*arguments)

    monkeypatch.setattr(converting, "repair", breaks)
    model = build("qwen2")
    before = fingerprint(model)
    with pytest.raises(MemoryError, match="planted"):
        hf_accel.convert_gqa(model, 1, calibration=IDS, repair_steps=2)
    assert not changes(before, fingerprint(model))
    calls.clear()
    with pytest.raises((MemoryError, UnsupportedModelError), match="planted"):
        hf_accel.optimize(model, GQAConfig(num_kv_heads=1, calibration=IDS, repair_steps=2))
    assert not changes(before, fingerprint(model))
    assert host_of(model) is None
