"""Sibling projections share one product on views of one storage: no memory, vanilla names, and no stale weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import optimised
from models import NAMES, build, padded, prompt
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel import SharedProjectionConfig
from hf_accel.core.drift import CACHE
from hf_accel.core.model.anatomy import Anatomy

GROUPED = [name for name in NAMES if Anatomy.of(build(name)).siblings()]


def shared(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return optimised(build(name, dtype), [SharedProjectionConfig()])


def text(model: Any) -> torch.Tensor:
    return model.generate(**padded([4, 9]), max_new_tokens=12, do_sample=False)


def storage_bytes(model: Any) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def products(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the rows of every product of a step of one token."""
    rows: list[int] = []
    linear = torch.nn.functional.linear
    with torch.no_grad(), monkeypatch.context() as patch:
        first = model(prompt(), use_cache=True)
        patch.setattr(torch.nn.functional, "linear", lambda i, w, b=None: (rows.append(w.shape[0]), linear(i, w, b))[1])
        model(prompt()[:, :1], **{CACHE: first[CACHE]})
    return rows


@pytest.mark.parametrize("name", GROUPED)
def test_views_of_one_storage(name: str) -> None:
    stock, model = build(name), shared(name)
    assert storage_bytes(model) == storage_bytes(stock)
    for siblings in Anatomy.of(stock).siblings():
        names = {id(module): path for path, module in stock.named_modules()}
        parent = model.get_submodule(names[id(siblings.parent)])
        modules = [parent._modules[child] for child in siblings.names]
        assert len({module.weight.untyped_storage().data_ptr() for module in modules}) == 1
        end = 0
        for module in modules:
            assert module.weight.storage_offset() == end
            assert module.weight.is_contiguous()
            end += module.weight.numel()
    hf_accel.restore(model)
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_one_product_instead_of_three(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = build(name), shared(name)
    layers = stock.config.num_hidden_layers
    separate, joined = products(stock, monkeypatch), products(model, monkeypatch)
    assert len(separate) - len(joined) == 3 * layers  # q, k, v in one; gate, up in one
    assert sum(separate) == sum(joined)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_stock(name: str, dtype: torch.dtype) -> None:
    stock, model = build(name, dtype), shared(name, dtype)
    with torch.no_grad():
        caches = [m(prompt(), use_cache=True)[CACHE] for m in (stock, model)]
        for tokens in (1, 3, 1):
            ids = prompt(tokens=tokens, seed=tokens)
            a, b = (m(ids, **{CACHE: c}).logits for m, c in zip((stock, model), caches, strict=True))
            assert float((a - b).norm() / a.norm()) < (1e-5 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_save_pretrained(name: str, tmp_path: Path) -> None:
    model = shared(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for (one, a), (two, b) in zip(again.state_dict().items(), build(name).state_dict().items(), strict=True):
        assert one == two
        assert torch.equal(a, b)
    assert torch.equal(text(model), text(again))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_to_another_dtype_ends_the_views_and_stays_right(name: str) -> None:
    stock, model = build(name).to(torch.float64), shared(name).to(torch.float64)
    assert torch.equal(text(model), text(stock))
    stock.to(torch.float32)
    model.to(torch.float32)
    assert torch.equal(text(model), text(stock))
    hf_accel.restore(model)
    assert torch.equal(text(model), text(stock))
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    stock, model = build("qwen2"), shared("qwen2")
    state = {key: tensor * 1.3 + 0.1 for key, tensor in stock.state_dict().items()}
    for each in (stock, model):
        each.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=assign)
    assert torch.equal(text(model), text(stock))


def test_weights_tied_to_one_another_are_left_alone() -> None:
    stock, model = build("llama"), build("llama")
    for each in (stock, model):
        attention = each.model.layers[0].self_attn
        attention.v_proj.weight = attention.k_proj.weight
    hf_accel.optimize(model, [SharedProjectionConfig()])
    skipped = {skip.what: skip.reason for skip in hf_accel.report(model).skipped}
    assert "share storage" in skipped["SharedProjectionConfig"]
    assert model.model.layers[0].self_attn.v_proj.weight is model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(text(model), text(stock))


def test_one_sibling_alone_or_out_of_order() -> None:
    """Each projection is an ordinary module: called alone, twice, in any order, it gives its own product."""
    stock, model = build("qwen2").model.layers[0].self_attn, shared("qwen2").model.layers[0].self_attn
    hidden, other = torch.randn(1, 2, 48), torch.randn(1, 2, 48)
    orders = [("k_proj",), ("v_proj", "q_proj", "k_proj"), ("q_proj", "q_proj", "v_proj", "v_proj"),
              ("q_proj", "other", "k_proj", "v_proj")]  # fmt: skip
    with torch.no_grad():
        for order in orders:
            for name in order:
                given = other if name == "other" else hidden
                name = "q_proj" if name == "other" else name
                torch.testing.assert_close(
                    getattr(model, name)(given), getattr(stock, name)(given), atol=1e-5, rtol=1e-5
                )


def test_an_input_changed_in_place_between_siblings() -> None:
    stock, model = build("qwen2").model.layers[0].self_attn, shared("qwen2").model.layers[0].self_attn
    with torch.no_grad():
        results = []
        for each in (stock, model):
            hidden = torch.ones(1, 1, 48)
            first = each.q_proj(hidden)
            hidden.mul_(2)
            results.append((first, each.k_proj(hidden), each.v_proj(hidden)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_after_the_last_sibling() -> None:
    attention = shared("llama").model.layers[0].self_attn
    hidden = torch.randn(1, 1, 52)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name)(hidden)
    assert attention.q_proj.group.latest.parts is None
    assert attention.q_proj.group.latest.input is None
