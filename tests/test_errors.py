"""Bad input: each gives a clear error of the tree, and the model stays exactly as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import exact
from fingerprint import changes, fingerprint
from models import build, prompt
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

import hf_accel
from hf_accel import (
    AttentionConfig,
    Config,
    ConfigError,
    ConflictError,
    DecoderBlockConfig,
    DecodingConfig,
    HfAccelError,
    KVCacheConfig,
    NativeLinearConfig,
    Plan,
    SharedProjectionConfig,
    UnsupportedModelError,
)

TINY_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}


def base_model() -> Any:
    return build("llama").model


def bert() -> Any:
    return BertModel(BertConfig(**TINY_BERT)).eval()


def masked_bert() -> Any:
    return BertForMaskedLM(BertConfig(**TINY_BERT)).eval()


def t5() -> Any:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def offloaded() -> Any:
    from accelerate import cpu_offload

    return cpu_offload(build("llama"), execution_device=torch.device("cpu"))


def dispatched() -> Any:
    model = build("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return model


def on_meta() -> Any:
    return build("llama").to("meta")


UNSUPPORTED = {
    "no generate": (base_model, ["LlamaModel", "generate", "AutoModelForCausalLM"]),
    "encoder only": (bert, ["BertModel", "generate"]),
    "encoder with a masked head": (masked_bert, ["BertForMaskedLM", "generate"]),
    "encoder-decoder": (t5, ["T5ForConditionalGeneration", "encoder-decoder"]),
    "offloaded": (offloaded, ["LlamaForCausalLM", "Load"]),
    "split by a device map": (dispatched, ["device_map", "Load"]),
    "meta weights": (on_meta, ["meta", "Load"]),
}


def state(model: Any) -> Any:
    """Return the fingerprint, of weights on the meta device only their identity."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return {
            name: (id(p), p.dtype, type(m))
            for (name, p), m in zip(model.named_parameters(), model.modules(), strict=False)
        }
    return fingerprint(model)


@pytest.mark.parametrize("title", UNSUPPORTED)
@pytest.mark.parametrize("verb", [hf_accel.optimize, hf_accel.plan])
def test_unsupported_models(title: str, verb: Any) -> None:
    build_model, words = UNSUPPORTED[title]
    model = build_model()
    before = state(model)
    for arguments in ((model,), (model, [DecodingConfig()])):
        with pytest.raises(UnsupportedModelError) as raised:
            verb(*arguments)
        for word in words:
            assert word in str(raised.value)
    assert not changes(before, state(model))


@pytest.mark.parametrize("thing", [None, 3, "gpt2", torch.nn.Linear(2, 2), torch.nn.Module, object(), [1], {}])
def test_not_a_model_at_all(thing: Any) -> None:
    for verb in (hf_accel.optimize, hf_accel.plan):
        with pytest.raises(UnsupportedModelError, match="transformers"):
            verb(thing)
    for verb in (hf_accel.restore, hf_accel.report):
        with pytest.raises(ConflictError, match="optimize"):
            verb(thing)


def test_already_optimised() -> None:
    model = build("llama")
    hf_accel.optimize(model, exact(model))
    before = fingerprint(model)
    for again in ("exact", [DecodingConfig()], Plan.of([DecodingConfig()])):
        with pytest.raises(ConflictError, match="restore"):
            hf_accel.optimize(model, again)
        with pytest.raises(ConflictError, match="restore"):
            hf_accel.plan(model, again if isinstance(again, str) else [DecodingConfig()])
    assert not changes(before, fingerprint(model))
    hf_accel.restore(model)


def test_restore_of_a_stock_model() -> None:
    model = build("llama")
    before = fingerprint(model)
    for verb in (hf_accel.restore, hf_accel.report):
        with pytest.raises(ConflictError, match="not optimised"):
            verb(model)
    hf_accel.optimize(model, [DecodingConfig()])
    hf_accel.restore(model)
    with pytest.raises(ConflictError, match="not optimised"):
        hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("goal", ["", "fastest", "EXACT", "exact ", "Fast", "memory "])
def test_unknown_goals(goal: str) -> None:
    model = build("llama")
    before = fingerprint(model)
    for verb in (hf_accel.optimize, hf_accel.plan):
        with pytest.raises(ConfigError, match="exact") as raised:
            verb(model, goal)
        assert repr(goal) in str(raised.value)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize(
    "configs",
    [3, None, object(), [3], ["exact"], [None], [DecodingConfig], DecodingConfig, [DecodingConfig(), "x"],
     {"type": "x"}, [{"type": "DecodingConfig"}]],
)  # fmt: skip
def test_what_is_no_config(configs: Any) -> None:
    model = build("llama")
    before = fingerprint(model)
    for verb in (hf_accel.optimize, hf_accel.plan):
        with pytest.raises(ConfigError):
            verb(model, configs)
    assert not changes(before, fingerprint(model))


def test_an_unregistered_config_names_the_known_ones() -> None:
    class StrangeConfig(Config):
        """A config without a patcher."""

    try:
        with pytest.raises(ConfigError, match=r"StrangeConfig.*DecodingConfig"):
            hf_accel.optimize(build("llama"), [StrangeConfig()])
    finally:
        del Config.types["StrangeConfig"]


def test_conflicting_configs() -> None:
    model = build("llama")
    before = fingerprint(model)
    for configs in ([NativeLinearConfig(), SharedProjectionConfig()], [DecodingConfig(), DecodingConfig()],
                    [NativeLinearConfig(), NativeLinearConfig(max_rows=3)]):  # fmt: skip
        for verb in (hf_accel.optimize, hf_accel.plan):
            with pytest.raises(ConflictError, match="Keep one"):
                verb(model, configs)
    assert not changes(before, fingerprint(model))


def test_all_obstacles_are_listed_at_once() -> None:
    model = build("gemma2").to(torch.float64)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError) as raised:
        hf_accel.optimize(model, [NativeLinearConfig(), AttentionConfig(), KVCacheConfig()])
    message = str(raised.value)
    assert "NativeLinearConfig" in message
    assert "AttentionConfig" in message
    assert "KVCacheConfig" not in message
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("config", [NativeLinearConfig, DecoderBlockConfig, SharedProjectionConfig])
@pytest.mark.parametrize("rows", [0, -1, 33, True, False, 2.0, 3.5, "8", None])
def test_values_out_of_range(config: Any, rows: Any) -> None:
    if (type(rows) is int and rows > 0) or (config is not SharedProjectionConfig and rows is None):
        assert config(max_rows=rows).max_rows == rows
        return
    with pytest.raises(ConfigError, match="max_rows"):
        config(max_rows=rows)
    with pytest.raises(ConfigError, match="max_rows"):
        Config.from_dict({"type": config.__name__, "max_rows": rows})


@pytest.mark.parametrize(
    "data",
    [{"type": "NoConfig"}, {"type": "DecodingConfig", "speed": 3}, {"type": 3}, {"type": None}, {}, {"type": []}],
)
def test_damaged_descriptions(data: Any) -> None:
    with pytest.raises(ConfigError):
        Config.from_dict(data)
    with pytest.raises(ConfigError):
        Plan.from_dict({"steps": [{"config": data}]})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"steps": 3}', '{"steps": [{}]}', '{"steps": [3]}',
                                  '{"skipped": [{"x": 1}]}'])  # fmt: skip
def test_damaged_plans(text: str) -> None:
    with pytest.raises(ConfigError):
        Plan.from_json(text)


@pytest.mark.parametrize("verify_on", [3, "text", torch.ones(3), torch.ones(1, 4), {"ids": prompt()},
                                       torch.full((1, 4), 5000)])  # fmt: skip
def test_bad_verification_text_leaves_the_model_alone(verify_on: Any) -> None:
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises((HfAccelError, ValueError, IndexError, RuntimeError, TypeError, KeyError)):
        hf_accel.optimize(model, [DecodingConfig()], verify_on=verify_on)
    assert not changes(before, fingerprint(model))


def test_configs_are_frozen_and_keyword_only() -> None:
    config = NativeLinearConfig(max_rows=4)
    with pytest.raises(AttributeError):
        config.max_rows = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        NativeLinearConfig(4)  # type: ignore[misc]
    assert config == NativeLinearConfig(max_rows=4)
    assert config != NativeLinearConfig(max_rows=5)


def test_the_tree() -> None:
    errors = [value for value in vars(hf_accel.errors).values() if isinstance(value, type)]
    assert all(issubclass(error, HfAccelError) for error in errors)
    for error in errors:
        assert error.__name__ in str(hf_accel.errors.__doc__), (
            f"draw {error.__name__} in the tree at the top of errors.py"
        )
        assert error is getattr(hf_accel, error.__name__)


def test_an_unloaded_base_class_is_named() -> None:
    model = AutoModel.from_config(build("llama").config)
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        hf_accel.optimize(model)
