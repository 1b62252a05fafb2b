"""What a user does to an optimised model is honoured: hooks, weights, dtypes, modes, compilation, other attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import LOSSLESS, exact, fits
from comparison import assert_close, assert_equal_calls, optimised
from models import FEW, NAMES, build, on_models, padded, prompt, stock
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as prune_weights
from transformers.pytorch_utils import Conv1D

import hf_accel
from hf_accel import DecoderBlockConfig, NativeLinearConfig, SharedProjectionConfig
from hf_accel.core.drift import CACHE
from hf_accel.kernels.native import NativeBlock

DEFAULTS = {"max_new_tokens": 14, "do_sample": False}


def text(model: Any, **arguments: Any) -> torch.Tensor:
    return model.generate(**padded([4, 9]), **(DEFAULTS | arguments))


def variants(name: str) -> list[Any]:
    """Return optimised models: everything exact, and with shared projections in place of native products."""
    model = build(name)
    found = [optimised(model)]
    shared = [SharedProjectionConfig(), *exact(model, NativeLinearConfig, SharedProjectionConfig, DecoderBlockConfig)]
    if fits(shared[0], model):
        found.append(optimised(model, shared))
    return found


def products(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]


def double_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def load_others(model: Any, **arguments: Any) -> None:
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(11)
    for tensor in state.values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    model.load_state_dict(state, **arguments)


def new_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def new_biases(model: Any) -> None:
    for module in products(model):
        if module.bias is not None:
            module.bias.data = module.bias.data + 0.7


def new_parameters(model: Any) -> None:
    for module in products(model):
        module.weight = nn.Parameter(module.weight.detach() * 1.3)


def no_biases(model: Any) -> None:
    for module in linears(model):
        module.bias = None


def norms_only(model: Any) -> None:
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight.data = module.weight.data * 1.4


def first_product_only(model: Any) -> None:
    module = products(model)[0]
    module.weight.data = module.weight.data * -1.0


CHANGES: dict[str, Callable[[Any], None]] = {
    "in place": double_in_place,
    "load_state_dict": load_others,
    "load_state_dict, assigned": lambda model: load_others(model, assign=True),
    "data": new_data,
    "data of biases": new_biases,
    "data of norms": norms_only,
    "data of one product": first_product_only,
    "new parameters": new_parameters,
    "biases taken away": no_biases,
    "to another dtype": lambda model: model.to(torch.float64),
    "to another dtype and back": lambda model: (model.to(torch.float64), model.to(torch.float32)),
    "frozen": lambda model: model.requires_grad_(False),
    "resized": lambda model: model.resize_token_embeddings(140, mean_resizing=False),
    "a module of the user's": lambda model: replace_one(model),
    "scaled by a parametrization": lambda model: scale_one(model),
    "weight norm": lambda model: [torch.nn.utils.parametrizations.weight_norm(m) for m in linears(model)[:3]],
    "a forward of the user's": lambda model: own_forward(model),
    "pruned": lambda model: prune(model),
}


def linears(model: Any) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


class Negated(nn.Module):
    """Wraps a product, as adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return -self.inner(hidden)


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.7


def replace_one(model: Any) -> None:
    for name in ("q_proj", "qkv_proj", "c_attn", "query_key_value", "o_proj"):
        for parent in model.modules():
            if isinstance(parent._modules.get(name), nn.Module):
                setattr(parent, name, Negated(getattr(parent, name)))
                return


def scale_one(model: Any) -> None:
    for module in products(model)[:2]:
        parametrize.register_parametrization(module, "weight", Scaled())


def own_forward(model: Any) -> None:
    module = products(model)[1]
    original = module.forward
    module.forward = lambda hidden: original(hidden) * 2


def prune(model: Any) -> None:
    for module in products(model)[:3]:
        prune_weights.l1_unstructured(module, "weight", 0.5)


# the ways in which weights become stale, and a module that is no longer ours: each can go wrong by architecture
EVERYWHERE = ["load_state_dict", "data", "new parameters", "a module of the user's"]


@functools.cache
def text_of_stock(name: str) -> torch.Tensor:
    return text(stock(name))


@pytest.mark.parametrize("title,name", on_models(CHANGES, EVERYWHERE))
def test_changed_weights_are_used(title: str, name: str) -> None:
    changed = build(name)
    if "another" in title and name in ("mixtral", "qwen3_moe", "deepseek_v3"):
        pytest.skip("transformers' expert products do not take this dtype on a CPU")
    before = text_of_stock(name)
    CHANGES[title](changed)
    expected = text(changed)
    for patched in variants(name):
        assert torch.equal(text(patched), before)
        CHANGES[title](patched)
        assert torch.equal(text(patched), expected)
        assert torch.equal(text(patched), expected)
    if title in ("in place", "data", "new parameters", "load_state_dict"):
        assert not torch.equal(before, expected), "the change does not show in the text"


@pytest.mark.parametrize("name", FEW)
def test_a_changed_parametrization_is_used(name: str) -> None:
    """The weight is computed anew at every call, so a copy of it taken once would be stale."""
    results = []
    for model in (build(name), *variants(name)):
        text(model)
        scale_one(model)
        first = text(model)
        for module in products(model)[:2]:
            with torch.no_grad():
                module.parametrizations.weight.original.mul_(-1.0)
        results.append((first, text(model)))
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][1])


@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_inner_modules_are_called(name: str) -> None:
    counts = []
    for model in (build(name), *variants(name)):
        text(model)
        calls: list[str] = []
        handles = []
        for path, module in model.named_modules():
            if not list(module.children()):
                note = lambda m, args, output, path=path, calls=calls: calls.append(path)  # noqa: E731
                handles.append(module.register_forward_hook(note))
        during = text(model)
        counts.append((sorted(calls), during.tolist()))
        for handle in handles:
            handle.remove()
        assert torch.equal(text(model), during)
    for found in counts[1:]:
        assert found == counts[0]


@pytest.mark.parametrize("name", FEW)
def test_hooks_that_change_values_are_honoured(name: str) -> None:
    texts = []
    for model in (build(name), *variants(name)):
        text(model)
        inner = products(model)[2]
        before = text(model)
        handle = inner.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
        changed = text(model)
        handle.remove()
        assert torch.equal(text(model), before)
        texts.append(changed)
    assert not torch.equal(texts[0], before)
    for found in texts[1:]:
        assert torch.equal(found, texts[0])


@pytest.mark.parametrize("name", FEW)
def test_global_forward_hooks_are_called(name: str) -> None:
    counts = []
    for model in (build(name), *variants(name)):
        calls: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, o, c=calls: c.append(type(m).__name__))
        try:
            text(model)
        finally:
            handle.remove()
        counts.append(sorted(calls))
    for found in counts[1:]:
        assert found == counts[0]


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_after_optimising(name: str) -> None:
    def call(model: Any) -> Any:
        with torch.no_grad():
            first = model(prompt()[:, :5], use_cache=True)
            return model(prompt()[:, 5:6], **{CACHE: first[CACHE]}, output_hidden_states=True).hidden_states

    stock = build(name)
    for patched in variants(name):
        assert_equal_calls(stock, patched, call)


@pytest.mark.parametrize("name", NAMES)
def test_training_mode_with_dropout(name: str) -> None:
    stock = build(name)
    for key in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout"):
        if hasattr(stock.config, key):
            setattr(stock.config, key, 0.3)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for key in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.3)
    patched = optimised(stock)
    stock.train()
    patched.train()
    assert_equal_calls(stock, patched, lambda model: text(model, max_new_tokens=6))
    stock.eval()
    patched.eval()
    assert_equal_calls(stock, patched, text)


@pytest.mark.parametrize("name", FEW)
def test_optimised_in_training_mode(name: str) -> None:
    model = build(name).train()
    model.model.eval() if hasattr(model, "model") else None
    modes = [module.training for module in model.modules()]
    hf_accel.optimize(model, exact(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(text(model.eval()), text(build(name)))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    def call(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            first = model(prompt()[:, :5], use_cache=True)
            return first.logits, model(prompt()[:, 5:6], **{CACHE: first[CACHE]}).logits

    stock = build(name)
    for patched in variants(name):
        expected, found = call(stock), call(patched)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_torch_compile(name: str) -> None:
    """Compiled by dynamo, run as they are: products appear as operators, results stay stock's."""
    stock, patched = build(name), optimised(build(name))
    expected = text(stock)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="eager")
    ids = prompt()
    with torch.no_grad():
        assert_close(stock(ids).logits, compiled(ids).logits)
        assert_close(stock(ids[:, :3], use_cache=False).logits, compiled(ids[:, :3], use_cache=False).logits)
    assert torch.equal(compiled.generate(**padded([4, 9]), **DEFAULTS), expected)
    assert torch.equal(text(patched), expected)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", FEW)
def test_traced_models_hold_no_constants(name: str) -> None:
    """A trace of an optimised model must compute with its input, or fail; never replay what it saw."""
    stock, patched = build(name), optimised(build(name))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = patched

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids, use_cache=False).logits

    other = prompt(tokens=4, seed=8)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), prompt(tokens=4), check_trace=False)
        assert_close(stock(other).logits, traced(other))


@pytest.mark.parametrize("name", [name for name in NAMES if build(name).config._attn_implementation == "sdpa"])
def test_another_attention_implementation(name: str) -> None:
    stock, patched = build(name), optimised(build(name))
    for implementation in ("eager", "sdpa"):
        stock.set_attn_implementation(implementation)
        patched.set_attn_implementation(implementation)
        assert_equal_calls(stock, patched, text)
        assert patched.config._attn_implementation == implementation


@pytest.mark.parametrize("config", LOSSLESS, ids=lambda config: type(config).__name__)
def test_two_models_in_two_threads(config: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    stock = build("llama")
    if not fits(config, stock):
        pytest.skip(f"{type(config).__name__} does not fit")
    patched = optimised(stock, [config])
    prompts = [prompt(tokens=3 + number, seed=number) for number in range(8)]
    call = lambda model, ids: model.generate(ids, attention_mask=torch.ones_like(ids), **DEFAULTS)  # noqa: E731
    expected = [call(stock, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: call(patched, ids), prompts))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    assert hf_accel.report(patched).to_dict()["calls"]["served"] in (0, 8)


@pytest.mark.native
@pytest.mark.parametrize("recorded", ["output_hidden_states", "output_attentions"])
def test_native_layers_return_after_recording(recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves its recording hooks on the modules for good; once idle they must not cost the native call."""
    calls: list[int] = []
    call = NativeBlock.__call__
    monkeypatch.setattr(NativeBlock, "__call__", lambda self, *args: calls.append(1) or call(self, *args))
    model = optimised(build("llama"))
    calls.clear()  # the audit's
    text(model)
    at_first = len(calls)
    calls.clear()
    text(model, **{recorded: True, "return_dict_in_generate": True})
    assert not calls, "a recorded layer runs its own modules"
    text(model)
    assert len(calls) == at_first > 0
