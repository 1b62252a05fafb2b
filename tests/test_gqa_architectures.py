"""A model in another architecture computes what it computed, and can then have fewer key and value heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import heads as tiny
import pytest
import torch
from models import EOS, build, padded, prompt
from transformers import AutoModelForCausalLM

from hf_accel.errors import UnsupportedModelError, VerificationError
from hf_accel.gqa.architectures import WAYS, architectures_for, in_architecture, table
from hf_accel.gqa.heads import attention_layers

# each way with the models that go it, and the share of their numbers that need no memory of their own
GONE: dict[tuple[str, str], float] = {
    ("gpt2", "gpt_bigcode"): 0.3,
    ("gpt2_scaled", "gpt_bigcode"): 0.2,
    ("opt", "gpt_bigcode"): 0.6,
    ("opt_bare", "gpt_bigcode"): 0.5,
    ("neox_parallel", "phi"): 0.3,
    ("gptj", "phi"): 0.7,
    ("codegen", "phi"): 0.7,
    ("neox_whole", "starcoder2"): 0.5,
    ("neox_whole", "nemotron"): 0.5,
    ("neox_sequential", "nemotron"): 0.5,
}
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


def test_every_way_is_gone() -> None:
    assert {(tiny.made(name).config.model_type, target) for name, target in GONE} == set(WAYS)


@pytest.mark.parametrize("name, target", GONE)
def test_the_same_logits_and_the_same_text(name: str, target: str, tmp_path: Path) -> None:
    model = tiny.made(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    new = in_architecture(model, target)
    assert new.config.model_type == target
    assert not new.training
    batch = padded([11, 5, 8])
    mask = batch["attention_mask"]
    inputs = batch | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected, found = (each(**inputs).logits[mask.bool()] for each in (model, new))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    text = model.generate(**batch, **GREEDY)
    assert torch.equal(new.generate(**batch, **GREEDY), text)
    new.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits[mask.bool()], found)
    assert torch.equal(reloaded.generate(**batch, **GREEDY), text)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name, target", GONE)
def test_fewer_heads_after_it(name: str, target: str) -> None:
    new = in_architecture(tiny.made(name), target)
    few = tiny.converted(new, 1)
    assert {layer.kv_heads for layer in attention_layers(few)} == {1}
    assert {layer.heads for layer in attention_layers(few)} == {4}
    cache = few(prompt(2, 9), use_cache=True).cache
    assert cache.layers[0].keys.shape[1] == 1


@pytest.mark.parametrize("name, target", GONE)
def test_equal_tensors_are_shared(name: str, target: str) -> None:
    model = tiny.made(name)
    new, own = in_architecture(model, target), tiny.storages(model)
    counts = [(p.numel(), p.untyped_storage().data_ptr() in own) for p in new.parameters()]
    assert sum(n for n, shared in counts if shared) >= GONE[name, target] * sum(n for n, _ in counts)
    assert (new.get_input_embeddings().weight is new.get_output_embeddings().weight) == new.config.tie_word_embeddings


@pytest.mark.parametrize("name, target", [("gpt2", "gpt_bigcode"), ("neox_parallel", "phi"), ("opt", "gpt_bigcode")])
def test_what_is_carried_over(name: str, target: str) -> None:
    model = tiny.made(name).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    model.generation_config.top_k = 3
    new = in_architecture(model, target)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.config._attn_implementation == "eager"
    assert (new.generation_config.eos_token_id, new.generation_config.top_k) == (EOS, 3)
    assert new.generation_config is not model.generation_config
    for attribute in (
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(new.config, attribute) == getattr(model.config, attribute), attribute


def test_tied_embeddings_stay_tied() -> None:
    model = build("gpt2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    new = in_architecture(model, "gpt_bigcode")
    assert new.get_input_embeddings().weight is new.get_output_embeddings().weight
    assert new.get_input_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "name, target, words",
    [
        ("gpt2", "phi", "it can be expressed as gpt_bigcode"),
        ("gpt_neox", "llama", "phi or starcoder2 or nemotron"),
        ("gpt_neox", "phi", "3 of 12 numbers of a head rotate, an odd number"),
        ("bloom", "falcon", "divides the slopes by the root of the head size"),
        ("mpt", "falcon", "divides the slopes by the root of the head size"),
        ("llama", "phi", "there is no other for it"),
        ("neox_parallel", "starcoder2", "use_parallel_residual=True"),
        ("neox_parallel", "nemotron", "use_parallel_residual=True"),
        ("neox_whole", "phi", "use_parallel_residual=False"),
        ("neox_sequential", "starcoder2", "rotary_pct"),
    ],
)
def test_ways_that_do_not_exist(name: str, target: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        in_architecture(tiny.made(name), target)


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("opt", {"do_layer_norm_before": False}, "norms do not stand before"),
        ("opt", {"word_embed_proj_dim": 24}, "projected to the hidden size"),
        ("gptj", {"rotary_dim": 0}, "0 of 12 numbers of a head rotate"),
    ],
)
def test_models_that_do_not_fit_their_way(name: str, values: dict[str, Any], words: str) -> None:
    model = tiny.made(name)
    vars(model.config).update(values)
    with pytest.raises(UnsupportedModelError, match=words):
        in_architecture(model, architectures_for(model.config.model_type)[0])


def test_a_way_that_is_wrong_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WAYS["gptj", "phi"]

    def wrong(model: Any) -> Any:
        new = right(model)
        new.lm_head.bias = torch.nn.Parameter(new.lm_head.bias + 0.1)
        return new

    monkeypatch.setitem(table.WAYS, ("gptj", "phi"), wrong)
    model = tiny.made("gptj").train()
    with pytest.raises(VerificationError, match="gptj model and what was built of it as phi disagree"):
        in_architecture(model, "phi")
    assert model.training
