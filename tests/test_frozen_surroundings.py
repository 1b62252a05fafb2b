"""Classes, functions and the arrangement of layers are changed after optimising: what runs is what stock runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import optimised
from models import build, prompt
from test_frozen_values import BLOCKS, outcome, scaled
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_accel.core.drift import CACHE

pytestmark = pytest.mark.native


def functions_of(model: Any) -> list[tuple[Any, str, Any]]:
    """Return owner, name and replacement of what all layers of a kind run through: methods of classes, functions."""
    layer = model.model.layers[1]
    own = {type(module) for module in layer.modules() if type(module).__module__.startswith("transformers.")}
    kinds = [*own, nn.Linear]
    found = [(kind, "forward", scaled(kind.forward)) for kind in kinds]
    attention = type(layer.self_attn)
    found += [(kind, "__call__", scaled(nn.Module.__call__)) for kind in (attention, nn.Module)]
    found += [(kind, "_norm", scaled(kind._norm)) for kind in kinds if hasattr(kind, "_norm")]
    file = __import__(attention.__module__, fromlist=["x"])
    found += [(file, "apply_rotary_pos_emb", scaled(file.apply_rotary_pos_emb))]
    found += [(file, "eager_attention_forward", scaled(file.eager_attention_forward))]
    found += [(file, "rotate_half", scaled(file.rotate_half))]
    for name in ("linear", "silu", "gelu", "softmax", "scaled_dot_product_attention"):
        found.append((functional, name, scaled(getattr(functional, name))))
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_classes_and_functions_are_watched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = build(name)
    ours, before = optimised(stock, BLOCKS), outcome(stock)
    shown = 0
    for owner, attribute, value in functions_of(stock):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            expected = outcome(stock)
            assert outcome(ours) == expected, f"{owner.__name__}.{attribute}"
            shown += expected != before
        assert outcome(ours) == before
    assert shown >= 8


@pytest.mark.parametrize("configs", [BLOCKS, None], ids=["blocks", "everything"])
def test_an_attention_registered_anew_is_used(configs: Any) -> None:
    stock = build("llama")
    ours, before = optimised(stock, configs), outcome(stock)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = scaled(original)
    try:
        expected = outcome(stock)
        assert outcome(ours) == expected != before
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert outcome(ours) == before


def renumbered(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def reversed_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def one_less(model: Any) -> None:
    del model.model.layers[0]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers -= 1


def twice(model: Any) -> None:
    model.model.layers.append(model.model.layers[1])


def of_another_model(model: Any) -> None:
    other = build("llama")
    for parameter in other.parameters():
        parameter.data *= 1.3
    model.model.layers[1] = optimised(other, BLOCKS).model.layers[1] if model.marked else other.model.layers[1]


def fewer_heads_said(model: Any) -> None:
    model.config.num_attention_heads = 2


def tied_within(model: Any) -> None:
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.gate_proj.weight = first.gate_proj.weight


def inference_weights(model: Any) -> None:
    with torch.inference_mode():
        weight = model.model.layers[1].mlp.up_proj.weight
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.clone() * 1.5, requires_grad=False)


def containers_exchanged(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm._parameters = {"weight": nn.Parameter(norm.weight.detach() * 2)}
    norm._forward_hooks = type(norm._forward_hooks)()
    norm.register_forward_hook(lambda module, args, output: output * 1.5)


ARRANGEMENTS = [
    renumbered, reversed_layers, one_less, twice, of_another_model, fewer_heads_said, tied_within, inference_weights,
    containers_exchanged,
]  # fmt: skip


@pytest.mark.parametrize("change", ARRANGEMENTS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_layers_are_arranged_anew(name: str, change: Callable[[Any], None]) -> None:
    if name == "phi3" and change not in (renumbered, reversed_layers, one_less, twice, fewer_heads_said):
        pytest.skip("its feed-forward part has other names")
    stock = build(name)
    ours = optimised(stock, BLOCKS)
    outcome(ours)
    for model in (stock, ours):
        model.marked = model is ours
        change(model)
    assert outcome(ours, 8) == outcome(stock, 8)


CHANGES: list[Callable[[Any], Any]] = [
    lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.9),
    lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 0.5),
    lambda model: setattr(
        model.model.layers[2].mlp.up_proj.weight, "data", model.model.layers[2].mlp.up_proj.weight * 2
    ),
    lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_between_calls_that_share_a_cache(change: Callable[[Any], Any]) -> None:
    """As the turns of a chat do; and between the steps of a loop of the caller's own."""
    stock = build("llama")
    ours, found = optimised(stock, BLOCKS), []
    with torch.no_grad():
        for model in (copy.deepcopy(stock), ours):
            asked = {"do_sample": False, "return_dict_in_generate": True}
            first = model.generate(prompt(), max_new_tokens=5, **asked)
            change(model)
            second = model.generate(first.sequences, max_new_tokens=8, **asked, **{CACHE: first[CACHE]})
            found.append(second.sequences.tolist())
        assert found[0] == found[1]
        stock = build("llama")
        ours, found = optimised(stock, BLOCKS), []
        for model in (stock, ours):
            cache, fed, steps = DynamicCache(config=stock.config), prompt(), []
            for step in range(8):
                if step == 4:
                    change(model)
                logits = model(fed, use_cache=True, **{CACHE: cache}).logits[:, -1:]
                fed = logits.argmax(dim=-1)
                steps.append(logits)
            found.append(torch.cat(steps))
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3)
