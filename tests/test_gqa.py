"""Fewer heads in use: in place and back, beside every other step, previewed, saved, drafting, adapted, on real text."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import exact
from fingerprint import changes, fingerprint
from heads import model_of, storages
from models import SMALL, Tiny, build, padded, prompt
from test_quantized_peft import with_adapter
from texts import tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_accel
from hf_accel import GQAConfig, KVCacheConfig, SpeculativeConfig, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.core.steps.plan import Plan
from hf_accel.gqa.heads import attention_layers
from hf_accel.gqa.preview import GQAPreview, Ratio, cache_bytes
from hf_accel.gqa.text import texts_for
from hf_accel.kernels import native

IDS = prompt(16, 32)
SETTINGS: dict[str, Any] = {"calibration": IDS, "repair_steps": 2}
ONE = GQAConfig(num_kv_heads=1, **SETTINGS)
NAMES = ["llama", "gemma3", "qwen2", "phi3"]
GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False}


@functools.cache
def few(name: str) -> Any:
    """Return the converted model that tests share: to be asked, not to be changed."""
    return hf_accel.convert_gqa(build(name), 1, **SETTINGS)


def in_place(name: str, *others: Config, **options: Any) -> Any:
    return hf_accel.optimize(build(name), [ONE, *others], **options)


def text(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(**padded([4, 11]), **(GREEDY | options))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids) if ids is not None else model(**padded([9, 20])).logits


def kl(new: Any, old: Any, ids: torch.Tensor) -> float:
    """Return the mean divergence per predicted token, in double precision."""
    with torch.no_grad():
        before, after = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (old, new))
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("name", NAMES)
def test_in_place_is_what_the_new_model_computes(name: str) -> None:
    model = in_place(name)
    assert torch.equal(logits(model), logits(few(name)))
    assert model.config.num_key_value_heads == few(name).config.num_key_value_heads == 1
    assert model.state_dict().keys() == few(name).state_dict().keys()
    assert all(torch.equal(t, few(name).state_dict()[key]) for key, t in model.state_dict().items())
    assert all(module.config.num_key_value_heads == 1 for module in model.modules() if hasattr(module, "config"))
    [step] = hf_accel.report(model).applied
    assert step.summary.startswith("2 -> 1 key/value heads (aligned; outputs of layers off by 0.")
    assert f"cache {2 * cache_bytes(model)} -> {cache_bytes(model)} bytes per token" in step.summary


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_modes_of_torch(mode: Any) -> None:
    model, other = build("llama"), build("llama")  # what is loaded under inference mode cannot be trained at all
    with mode():
        new = hf_accel.convert_gqa(model, 1, **SETTINGS)
        [preview] = hf_accel.plan(model, ONE).previews
        hf_accel.optimize(other, ONE)
    [expected] = hf_accel.plan(build("llama"), ONE).previews
    assert preview == expected
    for made in (new, other):
        assert torch.equal(logits(made), logits(few("llama")))
        made(prompt(), labels=prompt()).loss.backward()  # it may be trained


@pytest.mark.parametrize("kind", ["tensor", "numpy", "rows", "generator"])
def test_ways_to_give_token_ids(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    given = {"tensor": IDS, "numpy": IDS.numpy(), "rows": IDS.tolist(), "generator": (row for row in IDS.tolist())}
    config = GQAConfig(num_kv_heads=1, calibration=given[kind], repair_steps=2)
    assert config == ONE
    assert hash(config) == hash(ONE)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == ONE
    assert not recwarn.list


@pytest.mark.parametrize("originals", ["keep", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_everything_comes_back(name: str, originals: str) -> None:
    model = build(name)
    frozen = next(iter(attention_layers(model)[0].module.parameters())).requires_grad_(False)
    config, keys, before, bits = model.config, list(model.state_dict()), fingerprint(model), logits(model)
    called: list[str] = []
    hooks = [
        layer.module.register_forward_hook(lambda *_, path=layer.path: called.append(path))
        for layer in attention_layers(model)
    ]
    paths = [layer.path for layer in attention_layers(model)]
    hf_accel.optimize(model, ONE, originals=originals)
    assert called == [], "trials call the user's hooks"
    assert config.num_key_value_heads == 2, "other models may share the config"
    assert list(model.state_dict()) == keys
    assert not next(iter(attention_layers(model)[0].module.parameters())).requires_grad
    assert not torch.equal(logits(model), bits)
    assert called == paths
    hf_accel.restore(model)
    assert torch.equal(logits(model), bits)
    assert called == [*paths, *paths]
    for hook in hooks:
        hook.remove()
    assert model.config is config
    assert not frozen.requires_grad
    assert not changes(before, fingerprint(model))


def test_originals_given_up() -> None:
    model = build("llama")
    old = sum(p.numel() for layer in attention_layers(model) for p in layer.module.parameters())
    hf_accel.optimize(model, ONE, originals="drop")
    assert torch.equal(logits(model), logits(few("llama")))
    assert sum(p.numel() for layer in attention_layers(model) for p in layer.module.parameters()) < old
    report = hf_accel.report(model)
    assert report.applied[0].extra_bytes == 0
    assert report.patched_weight_bytes == sum(p.numel() * 4 for p in few("llama").parameters())
    with pytest.raises(hf_accel.IrreversibleError):
        hf_accel.restore(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_half_as_large(name: str) -> None:
    assert cache_bytes(build(name)) == 2 * cache_bytes(few(name))
    found = []
    for model in (build(name), few(name), in_place(name)):
        inputs = {"input_ids": prompt(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        cache = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)[CACHE]
        found.append([layer.keys.nbytes + layer.values.nbytes for layer in cache.layers])
        if model.config.get_text_config().to_dict().get("sliding_window") is None:
            assert sum(found[-1]) == cache_bytes(model) * 2 * 7  # rows, and tokens read
    assert [2 * size for size in found[1]] == found[0]
    assert found[2] == found[1]


BESIDE: dict[str, list[Config]] = {
    "8 bits": [WeightOnlyConfig(bits=8)],
    "4 bits": [WeightOnlyConfig(bits=4, group_size=32)],
    "cache in 8 bits": [KVCacheConfig(bits=8)],
    "cache on the cpu": [KVCacheConfig(store="cpu", device_budget_bytes=1 << 15)],
    "prefixes": [KVCacheConfig(prefix_reuse=True)],
    "lookup": [SpeculativeConfig(drafter="lookup", max_draft_tokens=4, adaptive=False)],
}


@pytest.mark.parametrize("title", BESIDE)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_beside_other_steps(name: str, title: str) -> None:
    """One after the other, on the model that has fewer heads, or both at once: the same text."""
    expected = text(hf_accel.optimize(hf_accel.convert_gqa(build(name), 1, **SETTINGS), BESIDE[title]))
    model = in_place(name, *BESIDE[title])
    assert torch.equal(text(model), expected)
    assert torch.equal(text(model), expected)
    if "bits" not in title:
        assert torch.equal(expected, text(few(name)))


def test_caches_of_calls() -> None:
    model = in_place("llama")
    for config in (KVCacheConfig(store="cpu", device_budget_bytes=1 << 15), KVCacheConfig(prefix_reuse=True), False):
        assert torch.equal(text(model, kv_cache=config), text(few("llama")))


@pytest.mark.native
def test_layers_run_natively_with_fewer_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = native.NativeBlock.__call__
    monkeypatch.setattr(native.NativeBlock, "__call__", lambda *a, **k: (calls.append(1), call(*a, **k))[1])
    model = in_place("llama", *exact(build("llama")))
    calls.clear()
    assert torch.equal(text(model), text(few("llama")))
    assert len(calls) >= 13 * 3, "steps after the first of 3 layers"
    report = hf_accel.report(model)
    assert any(step.summary.startswith("3 decoder layers run in one native call") for step in report.applied)
    assert (report.calls.served, report.calls.delegated) == (1, 0)


STOPPED = {"stop_strings": ["ab", "cd"], "tokenizer": tokenizer()}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "stopped": STOPPED | {"max_new_tokens": 30},
    "beams": {"num_beams": 2},
    "scores": {"return_dict_in_generate": True, "output_logits": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_calls_are_those_of_the_stock_model(name: str, call: str) -> None:
    model = in_place(name, *exact(build(name), speculates=call != "scores"))
    torch.manual_seed(3)
    expected = text(few(name), **CALLS[call])
    torch.manual_seed(3)
    found = text(model, **CALLS[call])
    if call == "scores":
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=2e-4, atol=2e-4)
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def test_a_streamer_hears_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    heard = []
    for model in (few("llama"), in_place("llama", *exact(build("llama")))):
        model.generate(prompt(), **GREEDY, streamer=TextStreamer(tokenizer()))
        heard.append(capsys.readouterr().out)
    assert heard[0] == heard[1] != ""


@pytest.mark.parametrize("method", ["aligned", "mean"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_preview_tells_what_comes(name: str, method: str) -> None:
    model = build(name)
    before, bits = fingerprint(model), logits(model)
    config = GQAConfig(num_kv_heads=1, method=method, **SETTINGS)
    plan = hf_accel.plan(model, config)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), bits)
    [preview] = plan.previews
    assert isinstance(preview, GQAPreview)
    [ratio] = preview.ratios
    assert (preview.kv_heads, ratio.kv_heads, preview.cache_bytes) == (2, 1, 2 * ratio.cache_bytes)
    fitted, rest = texts_for(model, config, None)
    assert (len(fitted.ids) if fitted is not None else 0, len(rest.ids)) == (
        (12, 4) if method == "aligned" else (0, 16)
    )
    ids = None if fitted is None else fitted.ids
    new = hf_accel.convert_gqa(model, 1, method=method, calibration=ids, repair_steps=2)
    assert ratio.quality.kl == pytest.approx(kl(new, build(name), rest.ids), rel=1e-4)
    assert len(ratio.layers) == model.config.num_hidden_layers
    model.model.layers[-1].self_attn = new.model.layers[-1].self_attn
    assert ratio.layers[-1] == pytest.approx(kl(model, build(name), rest.ids), rel=1e-4)
    words = str(plan)
    assert f"  1: KL {ratio.quality.kl:.3g} nats per token, perplexity {ratio.quality.perplexity_before:.2f}" in words
    assert f"cache {ratio.cache_bytes} bytes per token" in words
    assert str(IDS[0, :4].tolist())[1:-1] not in words, "the ids of the calibration text are printed"
    data = json.loads(plan.to_json())
    assert data["previews"] == json.loads(json.dumps([preview.to_dict()]))
    assert Plan.from_json(plan.to_json()).steps == plan.steps
    assert hf_accel.plan(build(name), plan).previews == [preview], "a plan that is given keeps what it tells"


def test_a_preview_has_every_ratio() -> None:
    model = model_of(Tiny("llama", SMALL | {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}))
    [preview] = hf_accel.plan(model, GQAConfig(num_kv_heads=2, **SETTINGS)).previews
    assert [ratio.kv_heads for ratio in preview.ratios] == [3, 2, 1]
    assert [ratio.cache_bytes * 6 for ratio in preview.ratios] == [preview.cache_bytes * n for n in (3, 2, 1)]
    assert [bool(ratio.layers) for ratio in preview.ratios] == [False, True, False]
    assert preview.ratios[0].quality.kl < preview.ratios[2].quality.kl
    quality = preview.ratios[0].quality
    made = GQAPreview(6, 1, "mean", (Ratio(3, quality, 1, (1.0, 4.0, 0.5, 9.0)), Ratio(1, quality, 1)))
    assert made.sensitive() == [3]
    assert "would gain by more heads if their architecture had them: layer 3" in str(made)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_an_ordinary_model(name: str, shares: bool, tmp_path: Path) -> None:
    model = build(name)
    before = fingerprint(model)
    new = hf_accel.convert_gqa(model, 1, shares=shares, **SETTINGS)
    assert not changes(before, fingerprint(model))
    assert type(new) is type(model)
    assert bool(storages(new) & storages(model)) == shares
    assert new.get_input_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr() or shares
    new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_key_value_heads == 1
    assert torch.equal(logits(again), logits(new))
    assert torch.equal(text(again), text(new))
    hf_accel.optimize(again, exact(again))
    assert torch.equal(text(again), text(new))
    hf_accel.optimize(new, WeightOnlyConfig(bits=8))
    hf_accel.restore(new)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_drafts_for_its_original(name: str) -> None:
    drafting = SpeculativeConfig(drafter="model", max_draft_tokens=4, adaptive=False)
    model = build(name)
    expected = text(model)
    hf_accel.optimize(model, [*exact(model), drafting], draft_model=few(name))
    assert torch.equal(text(model), expected)
    assert hf_accel.report(model).speculation.to_dict()["proposed"]["model"] > 0


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters() -> None:
    adapted = with_adapter(build("llama"), "llama")
    expected = logits(adapted)
    with pytest.raises(hf_accel.UnsupportedModelError, match="merge adapters first"):
        hf_accel.optimize(adapted, ONE)
    with pytest.raises(hf_accel.UnsupportedModelError, match="merge adapters first"):
        hf_accel.convert_gqa(adapted, 1, **SETTINGS)
    assert torch.equal(logits(adapted), expected)
    merged = adapted.merge_and_unload()
    assert hf_accel.convert_gqa(merged, 1, **SETTINGS).config.num_key_value_heads == 1
    for base in (hf_accel.convert_gqa(build("llama"), 1, **SETTINGS), in_place("llama")):
        wrapped = with_adapter(base, "llama", zero=True)
        assert torch.equal(logits(wrapped), logits(few("llama")))
        loss = wrapped(input_ids=prompt(), labels=prompt()).loss
        loss.backward()
        assert {"lora_" in n for n, p in wrapped.named_parameters() if p.grad is not None} == {True}
    wrapped = with_adapter(hf_accel.convert_gqa(build("llama"), 1, **SETTINGS), "llama")
    expected = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_text_that_the_model_writes() -> None:
    model = model_of(Tiny("llama", SMALL | {"num_hidden_layers": 1, "max_position_embeddings": 33}))
    state = torch.get_rng_state()
    found = [hf_accel.convert_gqa(model, 1, repair_steps=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(found[0]), logits(found[1])), "the same text, the same model"
    hf_accel.optimize(model, GQAConfig(num_kv_heads=1, repair_steps=1))
    assert torch.equal(logits(model), logits(found[0]))


def test_calibration_of_the_session() -> None:
    """What `optimize` is given serves where the config brings none, but for a fifth, which is measured on."""
    model = hf_accel.optimize(build("llama"), GQAConfig(num_kv_heads=1, repair_steps=2), calibration=IDS)
    part = hf_accel.convert_gqa(build("llama"), 1, calibration=IDS[:-3], repair_steps=2)
    assert torch.equal(logits(model), logits(part))
    assert hf_accel.report(model).quality.kl == pytest.approx(kl(part, build("llama"), IDS[-3:]), rel=1e-4)
    other = hf_accel.optimize(build("llama"), ONE, calibration=prompt(16, 32, seed=8))
    assert torch.equal(logits(other), logits(few("llama"))), "the config's own comes first"


@functools.cache
def library(first: int, count: int, width: int) -> torch.Tensor:
    """Return rows of the demo model's tokens for files of the standard library."""
    tokens = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
    folder = Path(os.__file__).parent
    words = "".join((folder / f"{name}.py").read_text() for name in ("argparse", "calendar", "textwrap"))
    ids = torch.tensor(tokens(words[: 10 * (first + count) * width])["input_ids"])
    return ids[first * width : (first + count) * width].view(count, width)


def test_a_trained_model_loses_a_third_of_what_pooling_loses() -> None:
    demo = AutoModelForCausalLM.from_pretrained(demo_path(), local_files_only=True).eval()
    fitted, rest = library(0, 24, 128), library(48, 8, 128)

    def perplexity(model: Any) -> float:
        with torch.no_grad():
            return float(model(rest, labels=rest).loss.double().exp())

    before = perplexity(demo)
    lost = {
        method: perplexity(hf_accel.convert_gqa(demo, 1, method=method, calibration=fitted, repair_steps=10)) - before
        for method in ("mean", "aligned")
    }
    assert 0 < lost["aligned"] < lost["mean"] / 3, (before, lost)


def test_texts_with_a_tokenizer() -> None:
    ids = prompt(8, 512)
    texts = [tokenizer().decode(row) for row in ids]
    expected = hf_accel.convert_gqa(build("qwen2"), 1, calibration=ids, repair_steps=0)
    options: dict[str, Any] = {"calibration": texts, "tokenizer": tokenizer()}
    found = hf_accel.convert_gqa(build("qwen2"), 1, repair_steps=0, **options)
    assert torch.equal(logits(found), logits(expected))
    model = hf_accel.optimize(build("qwen2"), GQAConfig(num_kv_heads=1, repair_steps=0), **options)
    part = hf_accel.convert_gqa(build("qwen2"), 1, calibration=ids[:6], repair_steps=0)
    assert torch.equal(logits(model), logits(part)), "a fifth is kept back to measure on"
    quality = hf_accel.report(model).quality
    assert quality.tokens == 2 * 511
    assert quality.kl == pytest.approx(kl(part, build("qwen2"), ids[6:]), rel=1e-4)
