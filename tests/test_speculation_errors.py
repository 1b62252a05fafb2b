"""What speculation refuses: each with a clear error, before anything runs, and the model stays as it was and usable."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import COMMON, SMALL, Tiny, build, padded, prompt, randomize
from speculating import always, ask, counts, noisy, speculating
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import hf_accel
from hf_accel import (
    Config,
    ConfigError,
    ConflictError,
    DecodingConfig,
    KVCacheConfig,
    SpeculativeConfig,
    UnsupportedModelError,
    WeightOnlyConfig,
)
from hf_accel.core.steps.setting import Setting
from hf_accel.speculative import patcher

PLAIN: list[Config] = [DecodingConfig(), KVCacheConfig()]


def refused(model: Any, configs: Any, words: list[str], error: type[Exception], **options: Any) -> None:
    """Optimising fails with these words; afterwards the model is the same, bit for bit, and can be optimised."""
    before, text = fingerprint(model), ask(model)
    with pytest.raises(error) as raised:
        hf_accel.optimize(model, configs, **options)
    for word in words:
        assert word in str(raised.value)
    assert not changes(before, fingerprint(model))
    with pytest.raises(ConflictError):
        hf_accel.report(model)
    assert torch.equal(ask(model), text)
    hf_accel.optimize(model, PLAIN)
    assert torch.equal(ask(model), text)


FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no drafts": ({"max_draft_tokens": 0}, ["max_draft_tokens", "1 to 32", "0 was given"]),
    "too many drafts": ({"max_draft_tokens": 33}, ["1 to 32", "33"]),
    "a truth as a number": ({"max_draft_tokens": True}, ["whole number", "True"]),
    "a fraction": ({"max_draft_tokens": 2.0}, ["whole number", "2.0"]),
    "unknown drafter": ({"drafter": "medusa"}, ["auto", "lookup", "layer_skip", "'medusa'"]),
    "nameless drafter": ({"drafter": ""}, ["lookup", "''"]),
    "no drafter": ({"drafter": None}, ["lookup", "None"]),
    "empty list": ({"drafter": []}, ["list", "()"]),
    "unknown in a list": ({"drafter": ["lookup", "medusa"]}, ["medusa"]),
    "auto in a list": ({"drafter": ["lookup", "auto"]}, ["auto"]),
    "a number in a list": ({"drafter": ["lookup", 3]}, ["3"]),
    "twice": ({"drafter": ["lookup", "self", "lookup"]}, ["once"]),
    "strict": ({"strict": "yes"}, ["strict", "True or False", "'yes'"]),
    "adaptive": ({"adaptive": 1}, ["adaptive", "True or False", "1 was given"]),
    "sampling": ({"sampling": "typical"}, ["same_draws", "residual", "'typical'"]),
    "bits": ({"bits": 3}, ["4 or 8", "3"]),
    "bits as a fraction": ({"bits": 4.0}, ["4 or 8", "4.0"]),
    "group size": ({"group_size": 48}, ["32, 64, 128", "48"]),
    "history": ({"history_tokens": -1}, ["history_tokens", "at least 0", "-1"]),
}


@pytest.mark.parametrize("title", FIELDS)
def test_fields_that_make_no_sense(title: str) -> None:
    fields, words = FIELDS[title]
    described = {"type": "SpeculativeConfig", **fields}
    for make in (lambda: SpeculativeConfig(**fields), lambda: Config.from_dict(described)):
        with pytest.raises(ConfigError) as raised:
            make()
        for word in [*words, "SpeculativeConfig"]:
            assert word in str(raised.value)


def test_fields_that_make_sense_survive_json() -> None:
    config = SpeculativeConfig(drafter=["lookup", "self"], max_draft_tokens=32, strict=True, sampling="residual")
    assert config.drafter == ("lookup", "self")
    assert Config.from_dict(config.to_dict()) == config
    assert len({config, SpeculativeConfig(drafter=("lookup", "self"), max_draft_tokens=32, strict=True,
                                          sampling="residual")}) == 1  # fmt: skip
    assert SpeculativeConfig().drafters(False) == ("lookup", "self")
    assert SpeculativeConfig().drafters(True) == ("lookup", "model")
    assert SpeculativeConfig(drafter="model").drafters(True) == ("model",)


def other_vocabulary() -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 99}))
    return model.eval()


DRAFTS: dict[str, tuple[Any, list[str]]] = {
    "missing": (lambda model: None, ["draft model", "draft_model="]),
    "itself": (lambda model: model, ["the model itself", 'drafter="self"']),
    "other vocabulary": (lambda model: other_vocabulary(), ["99 tokens", "128", "assistant_model"]),
    "on meta": (lambda model: build("llama").to("meta"), ["draft model cannot be used", "meta"]),
    "no head": (lambda model: build("llama").model, ["draft model cannot be used", "LlamaModel"]),
    "not a model": (lambda model: 3, ["draft model cannot be used"]),
}


@pytest.mark.parametrize("drafter", [("lookup", "model"), "auto"], ids=str)
@pytest.mark.parametrize("title", DRAFTS)
def test_draft_models_that_do_not_fit(title: str, drafter: Any) -> None:
    if title == "missing" and drafter == "auto":
        drafter = "model"  # without one the weights in few bits would draft
    make, words = DRAFTS[title]
    model = build("llama")
    configs = [*PLAIN, SpeculativeConfig(drafter=drafter)]
    refused(model, configs, ["SpeculativeConfig", *words], UnsupportedModelError, draft_model=make(model))


def test_a_draft_model_on_another_device() -> None:
    """The obstacle alone, by what two anatomies say of their devices."""
    setting = Setting.of(build("llama"), draft_model=build("llama"))
    assert patcher._draft_model_obstacles(setting) == []
    anatomy = SimpleNamespace(model=setting.model, device=torch.device("cuda:1"), architecture="Llama")
    far = SimpleNamespace(anatomy=anatomy, draft_model=build("llama"))
    (reason,) = patcher._draft_model_obstacles(far)  # type: ignore[arg-type]
    assert "the draft model is on cpu, the model on cuda:1" in reason


def recurrent(model_type: str, config: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
    randomize(model, Tiny(model_type, config))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": COMMON | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "recurrent_gemma": SMALL | {"num_hidden_layers": 3, "lru_width": 48},
}


@pytest.mark.parametrize("model_type", STATEFUL)
def test_recurrent_models(model_type: str) -> None:
    """Their layers read several tokens at once as if there had been none before."""
    model = recurrent(model_type, STATEFUL[model_type])
    text = ask(model)
    for drafter in ("lookup", "auto", "self"):
        with pytest.raises(UnsupportedModelError, match=r"taken? back"):
            hf_accel.optimize(model, [SpeculativeConfig(drafter=drafter)])
    hf_accel.optimize(model, [DecodingConfig()])
    with pytest.raises(UnsupportedModelError, match="taken back"):
        ask(model, speculative="lookup")
    assert torch.equal(ask(model), text)


def test_a_recurrent_draft_model() -> None:
    draft = recurrent("mamba", STATEFUL["mamba"])
    refused(build("llama"), [always("model")], ["draft model", "back"], UnsupportedModelError, draft_model=draft)


def test_layers_to_skip_must_be_there() -> None:
    refused(build("mistral"), [always("layer_skip")], ["only 2 layers"], UnsupportedModelError)
    refused(build("mistral"), [always(("lookup", "layer_skip"))], ["only 2 layers"], UnsupportedModelError)


def test_few_bits_of_few_bits() -> None:
    model = build("llama")
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        hf_accel.optimize(model, [WeightOnlyConfig(bits=8), *PLAIN, always("self")])
    with pytest.raises(ConflictError):
        hf_accel.report(model)
    assert torch.equal(ask(model), ask(build("llama")))
    hf_accel.optimize(model, [WeightOnlyConfig(bits=8), *PLAIN, SpeculativeConfig(adaptive=False)])
    assert torch.equal(ask(model), ask(model, speculative=False)), "auto goes on with lookup alone"
    assert "self" in str(hf_accel.report(model).skipped)
    with pytest.raises(UnsupportedModelError):
        ask(model, speculative="self")


def test_a_context_too_short_to_try_anything_in() -> None:
    model = build("llama")
    model.config.max_position_embeddings = 20
    refused(model, [always("lookup")], ["20 tokens"], UnsupportedModelError)


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "a number": ({"speculative": 3}, ConfigError, ["speculative", "3 was given"]),
    "one": ({"speculative": 1}, ConfigError, ["speculative", "1 was given"]),
    "another config": ({"speculative": KVCacheConfig()}, ConfigError, ["KVCacheConfig"]),
    "unknown drafter": ({"speculative": "medusa"}, ConfigError, ["medusa"]),
    "empty list": ({"speculative": []}, ConfigError, ["drafter"]),
    "no draft model": ({"speculative": "model"}, UnsupportedModelError, ["draft_model="]),
    "a tenant that is no text": ({"tenant": 3}, ConfigError, ["tenant", "3 was given"]),
    "a tenant that is none": ({"tenant": None}, ConfigError, ["tenant"]),
    "stock's lookup": (
        {"speculative": True, "prompt_lookup_num_tokens": 3},
        ConfigError,
        ["speculative", "prompt_lookup_num_tokens", "Leave one out"],
    ),
    "stock's lookup in a config": (
        {"speculative": "lookup", "generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
        ConfigError,
        ["prompt_lookup_num_tokens"],
    ),
}


@pytest.mark.parametrize("speculates", [True, False])
@pytest.mark.parametrize("title", BAD_CALLS)
def test_keywords_that_make_no_sense(title: str, speculates: bool) -> None:
    given, error, words = BAD_CALLS[title]
    model = build("llama")
    hf_accel.optimize(model, [*PLAIN, always("lookup")] if speculates else PLAIN)
    text = ask(build("llama"))
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    state = torch.get_rng_state()
    with pytest.raises(error) as raised:
        ask(model, **given)
    for word in words:
        assert word in str(raised.value)
    assert not forwards, "refused before anything runs"
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    assert hf_accel.report(model).to_dict()["calls"]["served"] == 0
    assert torch.equal(ask(model), text)


def test_two_ways_to_draft() -> None:
    model = speculating("llama", "lookup")
    with pytest.raises(ConfigError, match="assistant_model"):
        ask(model, speculative=True, assistant_model=noisy("llama"))
    text = ask(build("llama"))
    assert torch.equal(ask(model, assistant_model=noisy("llama")), text), "alone it goes to stock"
    assert torch.equal(ask(model, speculative=False, assistant_model=noisy("llama")), text)
    assert torch.equal(ask(model, prompt_lookup_num_tokens=3), text)
    assert counts(model)["calls"] == 0
    assert torch.equal(ask(model), text)
    assert counts(model)["calls"] == 1


def test_without_our_token_loop_what_a_call_asks_for_is_done_plainly() -> None:
    """A goal may have left the loop out; our keywords are understood on every optimised model."""
    model = hf_accel.optimize(build("llama"), [KVCacheConfig()])
    for value in (True, "lookup", always("lookup")):
        assert torch.equal(ask(model, speculative=value), ask(build("llama")))
    with pytest.raises(ConfigError, match="speculative is False, True"):
        ask(model, speculative=3)
    assert torch.equal(ask(model, speculative=False), ask(build("llama")))
    for name in ("speculative", "tenant"):  # not ours to take on a model that is not optimised
        with pytest.raises(ValueError, match=name):
            ask(build("llama"), **{name: "lookup"})


def test_a_call_that_fails_midway_leaves_the_next_one_alone() -> None:
    def fail(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.shape[1] > 12:
            raise RuntimeError("enough")
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    model = speculating("gemma3", ("lookup", "model"))
    for rows in (1, 4):
        with pytest.raises(RuntimeError, match="enough"):
            ask(model, rows, stopping_criteria=[fail])
        assert torch.equal(ask(model, rows), ask(build("gemma3"), rows))
    before = counts(model)
    with pytest.raises(ValueError):
        model.generate(**padded([3, 4]), num_beams=2, num_return_sequences=5)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(prompt(), nonsense=1)
    assert counts(model) == before
