"""What a cache config refuses, with a clear error before anything runs; budgets to the byte; and how all is undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_calls import CPU, peaks, shared, smallest, tight
from fingerprint import changes, fingerprint
from models import COMMON, build, padded, prompt
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_accel
from hf_accel import AttentionConfig, Config, ConfigError, DecodingConfig, KVCacheConfig, Plan, UnsupportedModelError
from hf_accel.cache.codec import Codec
from hf_accel.cache.division import divide
from hf_accel.cache.patcher import _shapes
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.drift import CACHE
from hf_accel.errors import StorageError

IDS, NEW = prompt(1, 50), 14
TOKENS = 50 + NEW
CPU_STORE: dict[str, Any] = {"store": "cpu"}
SNAP: dict[str, Any] = {"eviction": "snapkv", "kept_tokens": 64}


def ask(model: Any, **given: Any) -> Any:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **given})


FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bits 3": ({"bits": 3}, ["bits", "8 or 4", "3"]),
    "bits as a fraction": ({"bits": 8.0}, ["bits", "8.0"]),
    "bits as a truth": ({"bits": True}, ["bits", "True"]),
    "store": ({"store": "tape"}, ["device, cpu, disk", "'tape'"]),
    "no store": ({"store": None}, ["store", "None"]),
    "from_tokens": ({"bits": 8, "from_tokens": -1}, ["from_tokens", "at least 0", "-1"]),
    "from_tokens without bits": ({"from_tokens": 10}, ["from_tokens", "bits"]),
    "device budget of nothing": ({**CPU_STORE, "device_budget_bytes": 0}, ["device_budget_bytes", "at least 1"]),
    "device budget as a text": ({**CPU_STORE, "device_budget_bytes": "1G"}, ["device_budget_bytes", "'1G'"]),
    "cpu budget": ({**CPU_STORE, "cpu_budget_bytes": -1}, ["cpu_budget_bytes", "at least 0"]),
    "device budget without store": ({"device_budget_bytes": 9}, ["device_budget_bytes", 'store="cpu"']),
    "cpu budget without store": ({"cpu_budget_bytes": 9}, ["cpu_budget_bytes", 'store="cpu"']),
    "folder without disk": ({**CPU_STORE, "folder": "/tmp"}, ["folder", 'store="disk"']),
    "folder as a path": ({"store": "disk", "folder": Path("/tmp")}, ["folder", "string"]),
    "prefetch": ({"prefetch": 1}, ["prefetch", "True or False", "1 was given"]),
    "eviction": ({"eviction": "lru", "kept_tokens": 64}, ["eviction", "streaming", "'lru'"]),
    "streaming without a window": ({"eviction": "streaming"}, ["window"]),
    "streaming with kept tokens": ({"window": 8, "kept_tokens": 9}, ["kept_tokens", "streaming"]),
    "window": ({"window": 0}, ["window", "at least 1"]),
    "sinks": ({"window": 4, "sinks": -1}, ["sinks", "at least 0"]),
    "sinks alone": ({"sinks": 4}, ["sinks", "window or an eviction"]),
    "kept tokens alone": ({"kept_tokens": 4}, ["kept_tokens", "eviction"]),
    "kept tokens missing": ({"eviction": "h2o"}, ["kept_tokens", "32", "None"]),
    "kept tokens too few": ({"eviction": "tova", "kept_tokens": 36, "sinks": 4}, ["above", "36"]),
    "eviction and store": ({**SNAP, **CPU_STORE}, ["eviction", 'store="device"']),
    "eviction and prefixes": ({**SNAP, "prefix_reuse": True}, ["prefix_reuse", "exclude"]),
    "prefix_reuse": ({"prefix_reuse": "yes"}, ["prefix_reuse", "'yes'"]),
    "prefix budget": ({"prefix_reuse": True, "prefix_budget_bytes": 0}, ["prefix_budget_bytes", "at least 1"]),
    "prefix folder alone": ({"prefix_folder": "/tmp"}, ["prefix_folder", "prefix_reuse"]),
    "prefix folder": ({"prefix_reuse": True, "prefix_folder": 3}, ["prefix_folder", "string"]),
}


@pytest.mark.parametrize("title", FIELDS)
def test_fields_that_make_no_sense(title: str) -> None:
    fields, words = FIELDS[title]
    for make in (lambda: KVCacheConfig(**fields), lambda: Config.from_dict({"type": "KVCacheConfig", **fields})):
        with pytest.raises(ConfigError) as raised:
            make()
        for word in [*words, "KVCacheConfig"]:
            assert word in str(raised.value)


WHOLE = [
    KVCacheConfig(
        bits=8, from_tokens=5, store="disk", device_budget_bytes=9**7, cpu_budget_bytes=3, folder=".", prefetch=False
    ),
    KVCacheConfig(bits=4, eviction="snapkv", window=8, sinks=2, kept_tokens=20),
    KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=9, prefix_folder="x", window=None),
]


@pytest.mark.parametrize("config", WHOLE, ids=str)
def test_a_plan_survives_json(config: KVCacheConfig) -> None:
    plan = Plan.from_json(Plan.of([config, DecodingConfig()]).to_json())
    assert plan.steps[0].config == config
    assert hash(plan.steps[0].config) == hash(config)
    assert json.loads(plan.to_json())["steps"][0]["config"] == config.to_dict()


def refused(configs: Any, words: str, error: type[Exception], name: str = "llama", model: Any = None) -> None:
    """Optimising fails; the model is the same bit for bit, works, and can be optimised."""
    model = build(name) if model is None else model
    text, before = ask(model), fingerprint(model)
    with pytest.raises(error, match=words):
        hf_accel.optimize(model, configs)
    assert not changes(before, fingerprint(model))
    assert host_of(model) is None
    assert torch.equal(ask(model), text)
    hf_accel.optimize(model, [KVCacheConfig()])
    assert torch.equal(ask(model), text)


def refused_call(words: str, error: type[Exception], **given: Any) -> None:
    """A call fails before anything runs; those after it are as ever."""
    model = shared("llama")
    before, text, calls = fingerprint(model), ask(model), hf_accel.report(model).to_dict()["calls"]
    _shapes(host_of(model)).of(model)  # type: ignore[arg-type]  # found by a forward pass, once
    steps: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(error, match=words):
            ask(model, **given)
    finally:
        hook.remove()
    assert not steps, "the model ran"
    assert not changes(before, fingerprint(model))
    assert hf_accel.report(model).to_dict()["calls"] == calls
    assert torch.equal(ask(model), text)


def other(model_type: str, config: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **COMMON | config)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def odd() -> Any:
    sizes = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    return other("gpt2", {"n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": 256} | sizes)


def test_models_that_are_refused(tmp_path: Path) -> None:
    refused([KVCacheConfig(bits=4)], "odd size", UnsupportedModelError, model=odd())
    mamba = other("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8})
    before = fingerprint(mamba)
    for config in (KVCacheConfig(bits=8), KVCacheConfig(store="disk"), KVCacheConfig(window=9)):
        with pytest.raises(UnsupportedModelError, match=r"layers of other kinds|attention"):
            hf_accel.optimize(mamba, [config])
    assert not changes(before, fingerprint(mamba))
    refused([KVCacheConfig(store="cpu")], "asks for all keys and values", UnsupportedModelError, "deepseek_v3")
    refused([KVCacheConfig(window=16)], "asks for all keys and values", UnsupportedModelError, "deepseek_v3")
    eager = build("llama")
    eager.set_attn_implementation("eager")
    refused([KVCacheConfig(store="cpu")], "'eager', which was chosen", UnsupportedModelError, model=eager)
    for name in ("gemma3", "mistral"):
        refused([KVCacheConfig(window=16)], "sliding window of their own", UnsupportedModelError, name)
    eight = hf_accel.optimize(odd(), [KVCacheConfig(bits=8)])
    assert ask(eight).shape == (1, TOKENS)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (str(tmp_path / "missing"), str(tmp_path / "file" / "below")):
        config = KVCacheConfig(store="disk", folder=folder)
        refused([config], folder, ConfigError)
        for _ in range(2):
            refused_call(folder, ConfigError, kv_cache=config)
    vanishing = tmp_path / "folder"
    vanishing.mkdir()
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), KVCacheConfig(store="disk", folder=str(vanishing))])
    text = ask(model)
    vanishing.rmdir()
    with pytest.raises(ConfigError, match=str(vanishing)):
        ask(model)
    vanishing.mkdir()
    assert torch.equal(ask(model), text)


def test_calls_that_are_refused() -> None:
    for value in (None, True, 8, "cpu", {"bits": 8}, AttentionConfig()):
        refused_call("kv_cache is a KVCacheConfig, or False", ConfigError, kv_cache=value)
    config = KVCacheConfig(bits=8)
    refused_call("use_cache=False", ConfigError, kv_cache=config, use_cache=False)
    for name, value in (
        ("cache_implementation", "static"),
        (CACHE, DynamicCache()),
        ("past_key_values", DynamicCache()),
    ):
        refused_call(f"kv_cache and {name} both", ConfigError, kv_cache=config, **{name: value})
    refused_call("num_beams=3", ConfigError, kv_cache=KVCacheConfig(window=16), num_beams=3)
    refused_call("assisted", ConfigError, kv_cache=KVCacheConfig(window=16), prompt_lookup_num_tokens=3)
    reuse = KVCacheConfig(prefix_reuse=True)
    refused_call("inputs_embeds", ConfigError, kv_cache=reuse, inputs_embeds=torch.zeros(1, 50, 52))


def test_a_call_brings_the_attention_that_its_cache_needs() -> None:
    model, expected = build("llama"), ask(build("llama"))
    before = fingerprint(model)
    hf_accel.optimize(model, [DecodingConfig()])
    assert torch.equal(ask(model, kv_cache=KVCacheConfig(store="cpu")), expected)
    assert model.config._attn_implementation == "hfaccel_grouped"
    assert [type(step.config).__name__ for step in hf_accel.report(model).applied] == [
        "DecodingConfig",
        "AttentionConfig",
    ]
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    # where the cache cannot be had, the attention does not stay either
    refusing = hf_accel.optimize(build("deepseek_v3"), [DecodingConfig()])
    with pytest.raises(UnsupportedModelError, match="asks for all keys and values"):
        ask(refusing, kv_cache=KVCacheConfig(store="cpu"))
    assert refusing.config._attn_implementation == "sdpa"
    assert len(hf_accel.report(refusing).applied) == 1


def test_kv_cache_false_is_the_plain_cache() -> None:
    expected = ask(build("llama"))
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), KVCacheConfig(bits=4, window=8)])
    assert not torch.equal(ask(model), expected)
    assert torch.equal(ask(model, kv_cache=False), expected)
    found = hf_accel.report(model).to_dict()["kv_cache"]
    assert found["caches"] == {"4 bits, streaming": 1, "as it is": 1}


def test_what_a_plan_cannot_do_in_a_call_is_reported() -> None:
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), KVCacheConfig(window=16)])
    stock = build("llama")
    for given, reason in (({"num_beams": 2}, "beam search"), ({"prompt_lookup_num_tokens": 3}, "assisted generation")):
        assert torch.equal(ask(model, **given), ask(stock, **given))
        assert hf_accel.report(model).to_dict()["kv_cache"]["not_done"][f"nothing is given up in {reason}"] == 1
    assert torch.equal(ask(model, cache_implementation="static"), ask(stock, cache_implementation="static"))
    (reason,) = [text for text in hf_accel.report(model).to_dict()["kv_cache"]["not_done"] if "StaticCache" in text]
    assert reason in str(hf_accel.report(model))


def hot_bytes(outcome: Any) -> int:
    """Return what the buffers of the layers take."""
    return sum(layer.buffers.keys.nbytes + layer.buffers.values.nbytes for layer in outcome[CACHE].layers)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name, store", [("llama", "cpu"), ("llama", "disk"), ("gemma3", "disk")])
def test_a_budget_is_kept_to_the_byte(name: str, store: str, bits: int | None) -> None:
    model = shared(name)
    inputs = padded([40, 30, 17])
    given: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    least = smallest(model, 3, 79, bits)
    expected = None
    for more in (0, 1, 20_000, 10**7):
        config = KVCacheConfig(bits=bits, store=store, device_budget_bytes=least + more)
        found = model.generate(**inputs, **given, kv_cache=config)
        held = peaks(model)
        assert held["near"] + hot_bytes(found) <= least + more
        shapes = _shapes(host_of(model)).of(model)  # type: ignore[arg-type]
        division = divide(config, Codec(bits), shapes, 3, 79, CPU)
        assert hot_bytes(found) <= division.hot_bytes
        assert held["near"] <= division.near_bytes
        assert (held[store] > 0) == (more <= 1) or more == 20_000
        expected = found.sequences if expected is None else expected
        assert torch.equal(found.sequences, expected)
    refusing = KVCacheConfig(bits=bits, store=store, device_budget_bytes=least - 1)
    with pytest.raises(ConfigError, match=f"{least:,} bytes"):
        model.generate(**inputs, **given, kv_cache=refusing)
    planned = hf_accel.optimize(build(name), [refusing])
    with pytest.raises(ConfigError, match=f"{least:,} bytes"):
        planned.generate(**inputs, **given)
    assert planned.generate(**{k: v[:1] for k, v in inputs.items()}, **given).sequences.shape == (1, 80)


def test_windows_alone_must_fit_too() -> None:
    model = shared("mistral")
    least = smallest(model, 1, TOKENS)
    ask(model, kv_cache=KVCacheConfig(store="cpu", device_budget_bytes=least))
    with pytest.raises(ConfigError, match=f"2 layers with a window, of 1 rows, take {least:,} bytes"):
        ask(model, kv_cache=KVCacheConfig(store="cpu", device_budget_bytes=least - 1))


def test_both_budgets_are_of_one_memory_on_the_cpu() -> None:
    model = shared("llama")
    expected, least = ask(build("llama")), smallest(model, 1, TOKENS)
    needed = (TOKENS - 17) // 16 * 16 * 480 + 2 * 16 * 160 + 2 * 16 * 480  # blocks, buffers to read into, hot ones
    for device, cpu in ((None, needed), (least, needed - least), (needed, 0)):
        config = KVCacheConfig(store="cpu", device_budget_bytes=device, cpu_budget_bytes=cpu)
        found = ask(model, kv_cache=config, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected)
        assert sum(peaks(model).values()) + hot_bytes(found) <= needed
        config = KVCacheConfig(store="disk", device_budget_bytes=device, cpu_budget_bytes=cpu)
        found = ask(model, kv_cache=config, return_dict_in_generate=True)
        held = peaks(model)
        assert held["near"] + held["cpu"] + hot_bytes(found) <= needed
    with pytest.raises(StorageError, match="Raise the budgets"):
        ask(model, kv_cache=KVCacheConfig(store="cpu", device_budget_bytes=least, cpu_budget_bytes=1000))
    assert torch.equal(ask(model), expected)
    for config in (KVCacheConfig(store="disk", cpu_budget_bytes=0), KVCacheConfig(store="disk")):
        assert torch.equal(ask(model, kv_cache=config), expected)


@pytest.mark.parametrize(
    "config, fidelity",
    [
        (KVCacheConfig(), "exact"),
        (KVCacheConfig(store="cpu"), "exact"),
        (KVCacheConfig(store="disk"), "exact"),
        (KVCacheConfig(bits=8), "lossy"),
        (KVCacheConfig(window=8), "lossy"),
        (KVCacheConfig(bits=4, store="disk"), "lossy"),
    ],
    ids=str,
)
def test_restoring_and_what_the_report_says(config: KVCacheConfig, fidelity: str) -> None:
    model = build("llama")
    text, before = ask(model), fingerprint(model)
    with torch.no_grad():
        logits = model(**padded([9, 20])).logits
    with hf_accel.optimized(model, [DecodingConfig(), config]):
        changed = ask(model)
        assert fidelity == "lossy" or torch.equal(changed, text)
        steps = {type(step.config): step for step in hf_accel.report(model).applied}
        assert steps[KVCacheConfig].fidelity == fidelity
        assert (AttentionConfig in steps) == (config.store != "device" or config.window is not None)
        if config.store != "device":
            assert tight(model, config.store, 1, TOKENS).device_budget_bytes
    assert host_of(model) is None
    assert not changes(before, fingerprint(model))
    with torch.no_grad():
        assert torch.equal(model(**padded([9, 20])).logits, logits)
    assert torch.equal(ask(model), text)


def test_budgets_follow_the_dtype_that_the_model_has_now() -> None:
    model = hf_accel.optimize(build("llama").bfloat16(), [KVCacheConfig(), AttentionConfig(), DecodingConfig()])
    few, ids = smallest(model, 1, 79), prompt(1, 40)
    config = KVCacheConfig(store="cpu", device_budget_bytes=few)
    given: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "kv_cache": config}
    model.generate(ids, **given)
    model.float()
    least = smallest(model, 1, 79)
    assert least > few
    with pytest.raises(ConfigError, match=f"{least:,} bytes"):
        model.generate(ids, **given)
    model.bfloat16()
    found = model.generate(ids, **given, return_dict_in_generate=True)
    assert peaks(model)["near"] + hot_bytes(found) <= few
