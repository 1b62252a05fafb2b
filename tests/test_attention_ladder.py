"""The ladder of a model: what is chosen, what goes down and is counted, what is refused; text is stock's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from fingerprint import changes, fingerprint
from flash_standins import install
from models import build, padded
from transformers import GptOssConfig, GptOssForCausalLM

import hf_accel
from hf_accel import AttentionConfig
from hf_accel.attention import ladder as ladders
from hf_accel.attention import patcher, selftest, trials
from hf_accel.attention.kernels import KERNELS
from hf_accel.attention.statistics import Chosen
from hf_accel.core.calls.bands import BandMask, band_of
from hf_accel.core.drift import CACHE
from hf_accel.kernels.native import prompt

NAMED = ["sdpa", "tiled", pytest.param("native", marks=pytest.mark.native)]
LENGTHS = [34, 51, 40]  # longer than what is left to plain masks


def optimised(name: str, backend: str) -> Any:
    return hf_accel.optimize(build(name), [AttentionConfig(backend=backend)])


def calls(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = hf_accel.report(model).attention_calls.to_dict()  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "deepseek_v3", "gpt2"])
def test_prompts_are_stocks(name: str, backend: str) -> None:
    """Padded and whole, windows, keys and values of different sizes; and nothing else answered."""
    stock, model = build(name), optimised(name, backend)
    assert_equal_calls(stock, model, lambda m: m.generate(**padded(LENGTHS), max_new_tokens=6))
    assert_equal_calls(stock, model, lambda m: m.generate(padded([60])["input_ids"], max_new_tokens=6))
    found = calls(model)
    assert set(found["calls"]) == {backend}
    assert not found["falls"]
    with torch.no_grad():
        batch = padded(LENGTHS)
        logits = [m(**batch).logits[batch["attention_mask"].bool()] for m in (stock, model)]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", ["tiled", *NAMED[2:]])
def test_soft_caps(backend: str) -> None:
    stock, model = build("gemma2"), optimised("gemma2", backend)
    assert stock.config._attn_implementation == "eager"
    assert_equal_calls(stock, model, lambda m: m.generate(**padded(LENGTHS), max_new_tokens=6))
    assert set(calls(model)["calls"]) == {backend}
    again = copy.deepcopy(model)
    assert type(again.config._attn_implementation) is str
    assert again.config._attn_implementation == "eager"
    asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    assert_equal_calls(stock, model, lambda m: m.generate(**padded(LENGTHS), **asked).attentions[0][0])
    hf_accel.restore(model)
    assert model.config._attn_implementation == "eager"


def gpt_oss() -> Any:
    config = GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if "sinks" in name or "embed" in name else 0.3)
    return model


@pytest.mark.parametrize("backend", ["tiled", *NAMED[2:]])
def test_sinks(backend: str) -> None:
    stock = gpt_oss()
    model = hf_accel.optimize(copy.deepcopy(stock), [AttentionConfig(backend=backend)])
    batch = padded(LENGTHS)
    with torch.no_grad():
        first, second = (m(**batch).logits[batch["attention_mask"].bool()] for m in (stock, model))
        torch.testing.assert_close(second, first, atol=1e-3, rtol=1e-3)
        assert set(calls(model)["calls"]) == {backend}
        for layer in stock.model.layers:
            layer.self_attn.sinks += 3.0
        assert not torch.allclose(stock(**batch).logits[:, -1], second[-1], atol=1e-2), "sinks make no difference"


@pytest.mark.native
def test_what_a_kernel_cannot_do_goes_down_and_is_counted() -> None:
    """Summands of the user's are not for the native kernel; its caller gets stock's result all the same."""
    stock, model = build("llama"), optimised("llama", "native")
    ids = padded([40])["input_ids"]
    summand = torch.zeros(1, 1, 40, 40).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -1e9)
    summand[..., 3:] -= 0.5
    with torch.no_grad():
        logits = [m(ids, attention_mask=summand).logits for m in (stock, model)]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=2e-4)
    assert calls(model)["calls"] == {"tiled": 3}
    fall = {"kernel": "native", "reason": "it takes masks that hide, not summands", "calls": 3}
    assert calls(model)["falls"] == [fall]
    assert "3 calls past native: it takes masks" in str(hf_accel.report(model))


def test_a_kernel_that_fails_in_a_call_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model, tried = build("llama"), optimised("llama", "sdpa"), []

    def fails(*args: Any) -> Any:
        tried.append(args)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(type(KERNELS["sdpa"]), "attend", fails)
    assert_equal_calls(stock, model, lambda m: m.generate(**padded(LENGTHS), max_new_tokens=4))
    found = calls(model)
    assert len(tried) == 1, "it is not tried again in calls of this kind"
    assert found["falls"][0]["reason"] == "it failed (RuntimeError: no kernel image)"


def test_a_kernel_that_is_wrong_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = type(KERNELS["sdpa"]).attend
    monkeypatch.setattr(type(KERNELS["sdpa"]), "attend", lambda *args: right(*args) * 1.1)
    selftest.verdict.cache_clear()
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(hf_accel.VerificationError, match=r"sdpa.*off by 1\.0e-01 of a query; rounding explains 1e-04"):
        hf_accel.optimize(model, [AttentionConfig(backend="sdpa")])
    assert not changes(before, fingerprint(model))
    trials.chosen.cache_clear()
    hf_accel.optimize(model, [AttentionConfig()])
    assert "off by 1.0e-01" in calls(model)["refused"]["sdpa"]
    assert all(each["kernel"] != "sdpa" for each in calls(model)["chosen"])
    selftest.verdict.cache_clear()
    trials.chosen.cache_clear()


REFUSED = {
    "not installed": ("llama", "flash2", hf_accel.MissingDependencyError, r"flash_attn.*hf-accel\[flash\]"),
    "soft caps": ("gemma2", "sdpa", hf_accel.UnsupportedModelError, "caps no scores"),
    "device": ("llama", "cudnn", hf_accel.HfAccelError, "cuDNN"),
    "eager of the user's": ("eager", "sdpa", hf_accel.UnsupportedModelError, "chosen for it"),
    "nothing of ours": ("bloom", "sdpa", hf_accel.UnsupportedModelError, "only 'sdpa'|registry"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_refused_at_optimize(title: str) -> None:
    name, backend, error, words = REFUSED[title]
    if name == "bloom":
        from transformers import BloomConfig, BloomForCausalLM

        model: Any = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=16, n_layer=1, n_head=2)).eval()
    else:
        model = build("llama" if name == "eager" else name)
    if name == "eager":
        model.set_attn_implementation("eager")
    before = fingerprint(model)
    with pytest.raises(error, match=words):
        hf_accel.optimize(model, [AttentionConfig(backend=backend)])
    assert not changes(before, fingerprint(model))


def test_dtype_and_heads_of_a_named_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash2")
    with pytest.raises(hf_accel.UnsupportedModelError, match="it has no float32"):
        optimised("llama", "flash2")
    stock = build("llama", torch.bfloat16)
    model = hf_accel.optimize(copy.deepcopy(stock), [AttentionConfig(backend="flash2")])
    model.generate(**padded(LENGTHS), max_new_tokens=2)
    assert calls(model)["calls"] == {"flash2": 3}
    with pytest.raises(hf_accel.ConfigError, match=r"one of auto, flash4.*'fa'"):
        AttentionConfig(backend="fa")


def test_auto_takes_what_was_faster_by_kind_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(kind: Any, *_: Any) -> tuple[Chosen, ...]:
        if str(kind) == "causal":
            return Chosen("causal", 32, "stock", 1.0), Chosen("causal", 128, "tiled", 2.0)
        return (Chosen(str(kind), 32, "sdpa", 1.5),)

    monkeypatch.setattr(ladders, "chosen", chosen)
    stock, model = build("llama"), optimised("llama", "auto")
    for length, expected in ((40, {"stock": 3}), (140, {"stock": 3, "tiled": 3})):
        assert_equal_calls(stock, model, lambda m, n=length: m.generate(padded([n])["input_ids"], max_new_tokens=2))
        assert calls(model)["calls"] == expected
    assert_equal_calls(stock, model, lambda m: m.generate(**padded(LENGTHS), max_new_tokens=2))
    assert calls(model)["calls"]["sdpa"] == 3


def test_where_nothing_is_faster_it_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladders, "chosen", lambda kind, *_: (Chosen(str(kind), 32, "stock", 1.0),))
    monkeypatch.setattr(ladders, "grouped_gain", lambda *_: 1.0)
    plan = hf_accel.plan(build("bitnet"))
    skipped = {skip.what: skip.reason for skip in plan.skipped}
    assert skipped["AttentionConfig"] == "no attention kernel here is faster than stock's"
    model = optimised("bitnet", "auto")  # where it is named it does no harm
    assert_equal_calls(build("bitnet"), model, lambda m: m.generate(**padded(LENGTHS), max_new_tokens=3))


def test_trials_choose_what_is_shown_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"stock": 1.0, "sdpa": 0.98, "native": 0.5}
    monkeypatch.setattr(trials, "_least_times", lambda ways, device: {name: times[name] for name in ways})
    kind, shape = trials.Kind("causal"), selftest.Shape(torch.device("cpu"), torch.float32, (12, 12), 2)
    for candidates, kernel in ((("sdpa",), "stock"), (("sdpa", "native"), "native")):
        trials.chosen.cache_clear()
        found = trials.chosen(kind, shape, 1, candidates, len, 128, 1)
        assert {each.kernel for each in found} == {kernel}
        assert [each.positions for each in found] == [32, 128]
    trials.chosen.cache_clear()


def test_a_models_own_attention_that_computes_something_else_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gemma2 import modeling_gemma2

    right = modeling_gemma2.eager_attention_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output, weights = right(*args, **kwargs)
        return output * 1.2, weights

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", other)
    with pytest.raises(hf_accel.UnsupportedModelError, match="its own attention differs from what it asks for"):
        optimised("gemma2", "tiled")


@pytest.mark.native
@pytest.mark.parametrize("bits", [8, 4, None])
def test_prompts_over_codes_are_read_natively(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_accel.attention import held

    seen = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["bits"])
        return prompt.prompt_attention(*args, **kwargs)

    monkeypatch.setattr(held, "prompt_attention", noted)
    configs = [hf_accel.KVCacheConfig(bits=bits, store="device"), AttentionConfig(backend="tiled")]
    model = hf_accel.optimize(build("qwen3"), configs)
    model.generate(**padded(LENGTHS), max_new_tokens=2, prefill_chunk_size=20)
    assert set(seen) == (set() if bits is None else {bits})


def test_masks_are_bands_until_somebody_looks() -> None:
    model, seen = optimised("llama", "tiled"), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = padded(LENGTHS)
    with torch.no_grad():
        model(**batch)
    mask = seen[0]
    assert isinstance(mask, BandMask)
    assert band_of(mask).starts == (17, 0, 11)  # type: ignore[union-attr]
    assert torch.equal(mask & True, (batch["attention_mask"][:, None, None] > 0) & torch.ones(51, 51).bool().tril())
    assert patcher.SECTION in hf_accel.report(model).to_dict()
    assert CACHE in ("cache", "past_key_values")
