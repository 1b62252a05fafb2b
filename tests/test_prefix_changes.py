"""Prompts of a model that has changed: nothing that it computed before is reused, and what it computes now is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, padded, prompt
from test_prefix_calls import NEW, REUSING, computed, reusing, seen, stock, text
from test_wrappers import add_adapter
from torch import nn

import hf_accel
from hf_accel import DecodingConfig, KVCacheConfig
from hf_accel.cache.prefix import identity, reuse

# peft 0.21 asks transformers 5.23 for an attribute under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
__all__ = ["seen"]  # the fixture


def add(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)


def copy_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.2)


def load(model: Any) -> None:
    model.load_state_dict({name: 1.2 * tensor for name, tensor in model.state_dict().items()})


def assign(model: Any) -> None:
    model.load_state_dict({name: 1.2 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: 1.3 * output)


def hook_before(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (1.3 * args[0],))


def activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def layers(model: Any) -> None:
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]


def scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 3


def epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def own_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda hidden: 1.4 * original(hidden)


def transposed(model: Any) -> None:
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.flatten().view(weight.shape[1], weight.shape[0]).t()


CHANGES: list[Callable[[Any], None]] = [
    add, copy_data, load, assign, hook, hook_before, activation, dtype, rotary, layers, scaling,
    epsilon, own_forward, transposed,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("has_files", [False, True])
def test_changes_of_a_model_are_noticed(
    change: Callable[[Any], None], has_files: bool, tmp_path: Path, seen: list[int]
) -> None:
    chosen = KVCacheConfig(prefix_reuse=True, prefix_folder=str(tmp_path) if has_files else None)
    model, twin, ids = reusing(prefix_folder=chosen.prefix_folder), build("llama"), prompt(1, 150)
    before = text(model, ids, kv_cache=chosen)
    assert computed(seen, model, ids, kv_cache=chosen)[1] == 22
    change(model)
    change(twin)
    expected = text(twin, ids)
    assert change is dtype or not torch.equal(before, expected)
    found, fresh = computed(seen, model, ids, kv_cache=chosen)
    assert torch.equal(found, expected)
    assert fresh >= 150
    found, fresh = computed(seen, model, ids, kv_cache=chosen)
    assert torch.equal(found, expected)
    assert fresh == 22


def test_hooks_that_come_one_after_the_other_at_the_same_address() -> None:
    model, twin, ids = reusing(), build("llama"), prompt(1, 150)
    for factor in (1.2, 0.7, 1.4, 0.6):
        texts = []
        for one in (twin, model):
            handle = one.model.layers[0].register_forward_hook(lambda module, args, output: factor * output)  # noqa: B023
            texts.append(text(one, ids, **({"kv_cache": REUSING} if one is model else {})))
            handle.remove()
        assert torch.equal(*texts)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("is_early", [False, True])
def test_dtypes_follow_the_model(is_early: bool, bits: int | None, seen: list[int]) -> None:
    """Also where they change between optimising and the first call, and with attention that asks for tensors."""
    for attention in ("sdpa", "eager"):
        model, ids = build("llama", attention=attention), prompt(1, 150)
        hf_accel.optimize(model, [KVCacheConfig(bits=bits, prefix_reuse=True), DecodingConfig()])
        if not is_early:
            text(model, ids)
        model.to(torch.bfloat16)
        expected = text(model, ids, kv_cache=KVCacheConfig(bits=bits))
        for _ in range(2):
            seen.clear()
            assert torch.equal(text(model, ids), expected)
        assert sum(seen) == 22 + NEW - 1


@pytest.mark.parametrize("bits", [None, 8])
def test_autocast_is_another_way_to_compute(bits: int | None, seen: list[int]) -> None:
    model, ids = reusing(bits=bits), prompt(1, 150)
    chosen = KVCacheConfig(bits=bits, prefix_reuse=True)
    for kind in (None, torch.bfloat16, torch.float16):
        with nullcontext() if kind is None else torch.autocast("cpu", kind):
            expected = text(model, ids, kv_cache=KVCacheConfig(bits=bits))
            first, fresh = computed(seen, model, ids, kv_cache=chosen)
            assert fresh >= 150
            second, again = computed(seen, model, ids, kv_cache=chosen)
            assert again == 22
            assert torch.equal(first, expected)
            assert torch.equal(second, expected)


def test_other_attention(seen: list[int]) -> None:
    model, ids = reusing(), prompt(1, 150)
    text(model, ids, kv_cache=REUSING)
    model.set_attn_implementation("eager")
    expected = text(stock("llama"), ids)
    for tokens in (150, 22):
        found, fresh = computed(seen, model, ids)
        assert torch.equal(found, expected)
        assert fresh in (tokens, tokens + 2)


@pytest.mark.peft
@pytest.mark.parametrize("has_files", [False, True])
def test_adapters(has_files: bool, tmp_path: Path, seen: list[int]) -> None:
    from peft import LoraConfig

    chosen = KVCacheConfig(prefix_reuse=True, prefix_folder=str(tmp_path) if has_files else None)
    base, ids = reusing(prefix_folder=chosen.prefix_folder), prompt(1, 150)
    bare = text(base, ids, kv_cache=chosen)
    models = []
    for one in (build("llama"), base):
        wrapped = add_adapter(one, "llama")
        torch.manual_seed(4)
        wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
        models.append(wrapped)
    twin, model = models
    texts = [bare]
    for name in ("default", "other", "default"):
        twin.set_adapter(name)
        model.set_adapter(name)
        expected = text(twin, ids)
        for _ in range(2):
            found, fresh = computed(seen, model, ids, kv_cache=chosen)
            assert torch.equal(found, expected), name
        assert fresh == 22
        with model.disable_adapter():
            assert torch.equal(text(model, ids, kv_cache=chosen), bare)
        texts.append(expected)
    assert len({str(found.tolist()) for found in texts}) == 3


DEFECTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "columns as if nothing was padded": (
        reuse.PrefixReuse,
        "_restore",
        lambda old: (
            lambda self, cache, shapes, found, pads, *rest: old(self, cache, shapes, found, [0] * len(pads), *rest)
        ),
    ),
    "cut as if nothing was padded": (
        reuse,
        "_cut",
        lambda old: lambda cache, row, padding, *rest: old(cache, row, 0, *rest),
    ),
    "windows do not record": (reuse, "recording", lambda old: lambda cache: nullcontext()),
    "weights do not count": (identity, "_weights_digest", lambda old: lambda model: b""),
    "one tenant": (reuse.PrefixStore, "match", lambda old: lambda self, tenant, *rest: old(self, "a", *rest)),
}


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_planted_defects_show(defect: str, monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    def is_right(name: str) -> bool:
        model, twin, inputs = reusing(name), build(name), padded([150, 100, 140])
        texts = []
        for own in ("a", "a", "b"):
            found, fresh = computed(seen, model, inputs, tenant=own, prefill_chunk_size=40)
            texts.append(torch.equal(found, text(twin, inputs)))
        texts.append(fresh == 150)
        add(model)
        add(twin)
        return all(texts) and torch.equal(text(model, inputs, kv_cache=REUSING, tenant="a"), text(twin, inputs))

    def are_right() -> bool:
        return is_right("gemma3") and is_right("llama")

    place, name, change = DEFECTS[defect]
    with monkeypatch.context() as patched:
        patched.setattr(place, name, change(getattr(place, name)))
        with suppress(RuntimeError, IndexError):
            assert not are_right()
    assert are_right()


def test_a_method_of_a_class_is_exchanged(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, ids = reusing(), build("llama"), prompt(1, 150)
    before = text(model, ids, kv_cache=REUSING)
    kind = type(twin.model.layers[0].mlp)
    original = kind.forward
    for factor in (1.4, 0.7):
        monkeypatch.setattr(kind, "forward", lambda self, hidden: factor * original(self, hidden))  # noqa: B023
        expected = text(twin, ids)
        found, fresh = computed(seen, model, ids, kv_cache=REUSING)
        assert torch.equal(found, expected)
        assert fresh >= 150
        assert not torch.equal(expected, before)
        assert computed(seen, model, ids, kv_cache=REUSING)[1] == 22
