"""Prompts that begin like earlier ones: the same text, fewer tokens computed, nothing of other tenants or weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import optimised
from models import NAMES, TINY, VOCABULARY, build, padded, prompt
from processes import Running
from speculating import counts, speculating
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig, WeightOnlyConfig
from hf_accel.core.drift import CACHE
from hf_accel.core.model.discovery.hollow import Hollow
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.kernels import native

NEW = 6
REUSING = KVCacheConfig(prefix_reuse=True)


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of tokens that reached models, pass by pass; without a hook, which would be a change.

    What a copy without layers is asked is no token of a text; steps of a whole model ask no module.
    """
    found: list[int] = []
    forward, step, run = nn.Embedding.forward, native.NativeStep.__call__, Hollow.run

    def count(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if self.num_embeddings == VOCABULARY:
            found.append(ids.shape[-1])
        return forward(self, ids)

    def without_layers(*args: Any) -> Any:
        before = len(found)
        outputs = run(*args)
        del found[before:]
        return outputs

    monkeypatch.setattr(nn.Embedding, "forward", count)
    monkeypatch.setattr(native.NativeStep, "__call__", lambda *args: (found.append(1), step(*args))[1])
    monkeypatch.setattr(Hollow, "run", without_layers)
    return found


@functools.cache
def stock(name: str) -> Any:
    return build(name)


def reusing(name: str = "llama", **options: Any) -> Any:
    """Return a fresh optimised model that reuses prefixes, and has found out the shapes of its cache."""
    model = optimised(build(name))
    text(model, prompt(1, 2), kv_cache=KVCacheConfig(prefix_reuse=True, **options), max_new_tokens=1)
    return model


def text(model: Any, inputs: Any, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **arguments})


def computed(seen: list[int], model: Any, inputs: Any, **arguments: Any) -> tuple[Any, int]:
    """Return the text, and of how many columns of the prompt keys and values were computed."""
    seen.clear()
    found = text(model, inputs, **({"kv_cache": REUSING} | arguments))
    return found, sum(seen) - (arguments.get("max_new_tokens", NEW) - 1)


def said_of(model: Any) -> dict[str, Any]:
    """Return what the report says of caches."""
    return hf_accel.report(model).to_dict()["kv_cache"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_computes_only_the_rest(name: str, seen: list[int]) -> None:
    model, ids = reusing(name), prompt(1, 150)
    expected = text(stock(name), ids)
    for tokens in (150, 22):
        found, fresh = computed(seen, model, ids)
        assert fresh == tokens
        assert torch.equal(found, expected)
    inputs = padded([150, 100, 140, 90])  # the first row, three others
    expected = text(stock(name), inputs)
    for tokens in (150, 150 - (50 + 64)):
        found, fresh = computed(seen, model, inputs)
        assert fresh == tokens
        assert torch.equal(found, expected)
    assert said_of(model)["not_done"] == {}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_codes_are_reused_as_codes(name: str, bits: int, seen: list[int]) -> None:
    chosen, plain = KVCacheConfig(bits=bits, prefix_reuse=True), KVCacheConfig(bits=bits)
    model = reusing(name, bits=bits)
    for inputs, rest in ((prompt(1, 150), 22), (padded([150, 100, 140, 90], 4), 36)):
        expected = text(model, inputs, kv_cache=plain)
        for tokens in (150, rest):
            found, fresh = computed(seen, model, inputs, kv_cache=chosen)
            assert fresh == tokens
            assert torch.equal(found, expected)
    assert computed(seen, model, prompt(1, 150))[1] == 150, "codes are nothing for caches without"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_half_precision_reads_the_rest_as_a_chunk(name: str, seen: list[int]) -> None:
    model, ids = optimised(build(name).bfloat16()), prompt(1, 150)
    given: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    text(model, ids[:, :140], kv_cache=REUSING)
    chunks = text(model, ids, prefill_chunk_size=128, **given)
    found, fresh = computed(seen, model, ids, kv_cache=REUSING, **given)
    assert fresh == 22
    assert torch.equal(torch.stack(found.logits), torch.stack(chunks.logits))


STRATEGIES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.9, "seed": 3},
    "beams": {"num_beams": 3},
    "beams, sampling": {"num_beams": 2, "do_sample": True, "seed": 3},
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "seed": 3},
    "chunks": {"prefill_chunk_size": 40},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_strategy(name: str, strategy: str, seen: list[int]) -> None:
    model, arguments = reusing(name), STRATEGIES[strategy]
    text(model, prompt(1, 150), kv_cache=REUSING)
    for inputs, rest in ((prompt(1, 150), 22), (padded([150, 100, 140, 90], 3), 36)):
        if strategy == "lookup" and isinstance(inputs, dict):
            continue
        expected = text(stock(name), inputs, **arguments)
        for _ in range(2):
            found, fresh = computed(seen, model, inputs, **arguments)
            assert torch.equal(found, expected)
        assert fresh == rest or strategy == "lookup"


def test_longer_shorter_and_other_prompts(seen: list[int]) -> None:
    model, ids = reusing(), prompt(1, 200)
    other = ids.clone()
    other[0, 100] = 9 if ids[0, 100] != 9 else 10
    early = ids.clone()
    early[0, 0] = 9 if ids[0, 0] != 9 else 10
    asked = [(ids[:, :150], 150), (ids, 200 - 128), (ids, 200 - 192), (ids[:, :128], 1), (ids[:, :129], 1)]
    asked += [(ids[:, :64], 1), (ids[:, :63], 63), (other, 200 - 64), (early, 200), (ids[:, 1:], 199), (ids, 8)]
    for inputs, tokens in asked:
        found, fresh = computed(seen, model, inputs)
        assert fresh == tokens
        assert torch.equal(found, text(stock("llama"), inputs))


def test_rows_of_a_batch_begin_differently(seen: list[int]) -> None:
    model, ids = reusing(), prompt(3, 150)
    for row in range(2):
        text(model, ids[row : row + 1], kv_cache=REUSING)
    mixed = torch.cat([ids[1:2], ids[:1], torch.cat([ids[:1, :70], ids[2:, 70:]], 1)])
    found, fresh = computed(seen, model, mixed)
    assert fresh == 150 - 64, "all rows of a cache have as many columns"
    assert said_of(model)["prefixes"]["reused_tokens"] == 3 * 64, "what was found is not what is reused"
    assert torch.equal(found, text(stock("llama"), mixed))
    assert computed(seen, model, mixed)[1] == 22
    found, fresh = computed(seen, model, ids)  # of the third nothing is known
    assert fresh == 150
    assert torch.equal(found, text(stock("llama"), ids))


def test_tenants_reuse_only_their_own(seen: list[int]) -> None:
    model, ids = reusing(), prompt(1, 150)
    expected = text(stock("llama"), ids)
    for own in ({}, {"tenant": "a"}, {"tenant": "b"}, {"tenant": ""}, {"tenant": "None"}):
        for tokens in (150, 22):
            found, fresh = computed(seen, model, ids, **own)
            assert fresh == tokens, own
            assert torch.equal(found, expected)
    found = said_of(model)["prefixes"]
    assert found["crossings"] == 0
    assert "tenants" not in found


def test_tenants_in_threads() -> None:
    model = reusing()
    bases = prompt(3, 140, seed=8)
    ends = prompt(8, 20, seed=9)
    prompts = [torch.cat([bases[at % 3 : at % 3 + 1], ends[at : at + 1]], 1) for at in range(8)]
    expected = [text(stock("llama"), ids) for ids in prompts]
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait(60)
        for step in range(4):
            at = (number + 3 * step) % 8
            try:
                found = model.generate(
                    prompts[at],
                    max_new_tokens=NEW,
                    do_sample=False,
                    kv_cache=REUSING,
                    tenant="abc"[(number + step) % 3],
                )
                if not torch.equal(found, expected[at]):
                    wrong.append(at)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    found = said_of(model)["prefixes"]
    assert found["crossings"] == 0
    assert found["hits"] >= 8


def with_holes() -> dict[str, torch.Tensor]:
    inputs = padded([150, 140])
    inputs["attention_mask"][:, 30:40] = 0
    return inputs


def padded_on_the_right() -> dict[str, torch.Tensor]:
    inputs = {"input_ids": prompt(2, 150), "attention_mask": torch.ones(2, 150, dtype=torch.long)}
    inputs["attention_mask"][1, 140:] = 0
    return inputs


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "inputs_embeds": ("tokens alone", lambda m: m.generate(inputs_embeds=m.get_input_embeddings()(prompt(1, 150)))),
    "hidden states": (
        "output_hidden_states",
        lambda m: m.generate(prompt(1, 150), output_hidden_states=True, return_dict_in_generate=True).hidden_states[0],
    ),
    "holes": ("holes", lambda m: m.generate(**with_holes())),
    "right padding": ("padding on the right", lambda m: m.generate(**padded_on_the_right())),
    "positions": (
        "caller's own",
        lambda m: m.generate(prompt(1, 150), position_ids=2 * torch.arange(150)[None]),
    ),
    "token types": (
        "token_type_ids",
        lambda m: m.generate(prompt(1, 150), token_type_ids=torch.full((1, 150), 5)),
    ),
    "training": ("being trained", lambda m: m.train().generate(prompt(1, 150))),
    "static": ("StaticCache", lambda m: m.generate(prompt(1, 150), cache_implementation="static")),
    "no cache": ("not one of ours", lambda m: m.generate(prompt(1, 150), use_cache=False)),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_calls_that_cannot_reuse_are_served_and_counted(call: str) -> None:
    name = "gpt2" if call == "token types" else "llama"
    reason, generate = CALLS[call]
    found = []
    for is_ours in (False, True):
        model = build(name)
        model.generation_config.update(max_new_tokens=NEW, do_sample=False)
        if is_ours:
            hf_accel.optimize(model, [AttentionConfig(), REUSING, DecodingConfig()])
            for inputs in (prompt(1, 150), prompt(2, 150), padded([150, 140])):
                text(model, inputs)  # there is something to reuse wrongly
        if call == "training":
            model.config.attention_dropout = 0.0
        found.append(generate(model))
    for one, two in zip(*[[part] if isinstance(part, torch.Tensor) else part for part in found], strict=True):
        torch.testing.assert_close(two, one, atol=1e-3, rtol=1e-3)
    assert any(reason in said for said in said_of(model)["not_done"]), said_of(model)["not_done"]


def test_what_excludes_reuse_is_refused() -> None:
    model = reusing()
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 52), kv_cache=REUSING)
    for kind, more in (
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"short_factor": [1.0] * 5, "long_factor": [2.0] * 5}),
    ):
        rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **more}
        config = AutoConfig.for_model("llama", **(TINY["llama"].config | {"rope_parameters": rope}))
        moving = optimised(AutoModelForCausalLM.from_config(config).eval())
        with pytest.raises(UnsupportedModelError, match=kind):
            text(moving, prompt(1, 80), kv_cache=REUSING)


def test_memory_has_a_bound(seen: list[int]) -> None:
    block = 64 * 3 * 2 * 2 * 10 * 4  # tokens, layers, keys and values, heads, head size, bytes
    model, budget = reusing(prefix_budget_bytes=3 * block + 5), 3 * block + 5
    chosen = KVCacheConfig(prefix_reuse=True, prefix_budget_bytes=budget)
    for seed in (1, 2, 3, 1):
        for rest in (150, 22):
            found, fresh = computed(seen, model, prompt(1, 150, seed), kv_cache=chosen)
            assert torch.equal(found, text(stock("llama"), prompt(1, 150, seed)))
            assert fresh in (rest, rest - 64)  # a beginning may still be there
            assert said_of(model)["prefixes"]["bytes"] <= budget
    assert said_of(model)["prefixes"]["evicted_blocks"] > 0


SECOND = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from comparison import optimised
from models import build, prompt
import hf_accel
torch.set_num_threads(1)
model = optimised(build("gemma3"))
config = hf_accel.KVCacheConfig(prefix_reuse=True, prefix_folder=sys.argv[2])
for tenant in ("b", "a"):
    found = model.generate(prompt(1, 150), max_new_tokens=6, do_sample=False, kv_cache=config, tenant=tenant)
    print(found[0, 150:].tolist())
    counts = hf_accel.report(model).to_dict()["kv_cache"]["prefixes"]
    print(counts["reused_tokens"], counts["file_blocks_read"], counts["crossings"])
"""


def test_a_second_process_reuses_what_is_on_the_disk_and_damage_is_noticed(tmp_path: Path, seen: list[int]) -> None:
    chosen = KVCacheConfig(prefix_reuse=True, prefix_folder=str(tmp_path))
    model, ids = reusing("gemma3", prefix_folder=str(tmp_path)), prompt(1, 150)
    expected = text(stock("gemma3"), ids)
    assert torch.equal(text(model, ids, kv_cache=chosen, tenant="a"), expected)
    done = Running(SECOND, tmp_path.with_suffix(".output"), Path(__file__).parent, tmp_path)
    assert done.wait(300) == 0, done.stderr[-2000:]
    line = str(expected[0, 150:].tolist())
    assert done.stdout.splitlines() == [line, "0 0 0", line, "128 2 0"]
    files = [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]
    assert len(files) == 4, "two blocks of each tenant"
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = reusing("gemma3", prefix_folder=str(tmp_path))
    found, fresh = computed(seen, again, ids, kv_cache=chosen, tenant="a")
    assert fresh == 150
    assert torch.equal(found, expected)
    assert said_of(again)["prefixes"]["damaged"] >= 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_with_drafts(name: str) -> None:
    model = speculating(name, "lookup")
    for inputs in (prompt(1, 150), padded([150, 100, 140])):
        expected = text(stock(name), inputs, max_new_tokens=20)
        for _ in range(3):
            assert torch.equal(text(model, inputs, kv_cache=REUSING, max_new_tokens=20), expected)
    assert said_of(model)["prefixes"]["reused_tokens"] > 0
    assert sum(counts(model)["proposed"].values()) > 0


def test_with_quantized_weights(seen: list[int]) -> None:
    model = build("llama")
    hf_accel.optimize(model, [WeightOnlyConfig(bits=8), AttentionConfig(), REUSING, DecodingConfig()])
    expected = text(model, prompt(1, 150), kv_cache=False)
    text(model, prompt(1, 150))
    seen.clear()
    assert torch.equal(text(model, prompt(1, 150)), expected)
    assert sum(seen) == 22 + NEW - 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_returned_cache_goes_on_and_is_the_callers(name: str, seen: list[int]) -> None:
    model, ids = build(name), prompt(1, 150)
    hf_accel.optimize(model, [AttentionConfig(), REUSING, DecodingConfig()])
    expected = text(stock(name), ids, max_new_tokens=2 * NEW)
    text(model, ids)
    first = text(model, ids, return_dict_in_generate=True)
    assert torch.equal(first.sequences, expected[:, : 150 + NEW])
    assert first[CACHE].get_seq_length() == 150 + NEW - 1
    if name == "gemma3":  # windows forget again what they cannot see
        assert first[CACHE].layers[0].keys.shape[2] == TINY[name].config["sliding_window"] - 1
    seen.clear()
    assert torch.equal(text(model, first.sequences, **{CACHE: first[CACHE]}), expected)
    assert sum(seen) == NEW
    for layer in first[CACHE].layers:  # what is the caller's is written to, and the store's is not
        layer.keys.zero_()
        layer.values.zero_()
    found, fresh = computed(seen, model, ids, max_new_tokens=2 * NEW, kv_cache=REUSING)
    assert (fresh, found.tolist()) == (22, expected.tolist())
