"""Nothing that a native call took from a layer goes stale: every attribute, tensor and method of a layer is changed.

A change is made to a stock model and to its optimised twin, both are run, and the change is undone. Texts must be the
same, or errors of the same type; afterwards, the texts of before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparison import optimised
from models import build, padded
from torch import nn

from hf_accel import DecoderBlockConfig, DecodingConfig, KVCacheConfig, NativeLinearConfig, SharedProjectionConfig
from hf_accel.core.model import watching
from hf_accel.kernels import native
from hf_accel.layers.guard import BlockStep

pytestmark = pytest.mark.native
BLOCKS = [NativeLinearConfig(max_rows=16), DecoderBlockConfig(max_rows=16), KVCacheConfig(), DecodingConfig()]
PRODUCTS = [NativeLinearConfig(max_rows=16), KVCacheConfig(), DecodingConfig()]
SHARED = [SharedProjectionConfig(max_rows=16), KVCacheConfig(), DecodingConfig()]
# what torch and transformers keep in a module's dictionary; its contents are changed as tensors, children and hooks
CONTAINERS = {"_parameters", "_buffers", "_modules", "config"}
WALKED = {"llama": 286, "gemma2": 340, "qwen3": 334, "phi3": 220, "mistral": 286}


@dataclass
class Mutation:
    """A change, made to the model it is given; it returns what takes it back."""

    title: str
    make: Callable[[Any], Callable[[], None]]


def put(space: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an object or an entry of a dictionary and return what takes that back."""
    space = space if isinstance(space, dict) else vars(space)
    absent = object()
    before = space.get(name, absent)
    space[name] = value
    return lambda: space.pop(name) if before is absent else space.update({name: before})


def other_values(value: Any) -> list[Any]:
    """Return values that an attribute could be given instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, -value]
    if isinstance(value, float):
        return [value * 1.5 + 0.25, torch.tensor(value * 1.5 + 0.25)]
    if isinstance(value, str):
        return [value + "x"]
    return [0.5] if value is None else []


def of_attributes(path: str, module: nn.Module) -> Iterator[Mutation]:
    for name, value in vars(module).items():
        if name in CONTAINERS:
            continue
        for other in other_values(value):
            yield Mutation(
                f"{path}.{name} = {other!r}",
                lambda model, name=name, other=other: put(model.get_submodule(path), name, other),
            )


def strided(data: torch.Tensor) -> torch.Tensor:
    return data.as_strided(data.shape, (0, 1) if data.dim() == 2 else (0,))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda data: data.t(),
    "strided": strided,
    "sliced": lambda data: data[:1],
    "reshaped": lambda data: data.reshape(-1, 2),
    "flat": lambda data: data.flatten(),
    "every second": lambda data: data[::2],
    "reversed": lambda data: data.flip(0),
    "float64": lambda data: data.double(),
    "bfloat16": lambda data: data.bfloat16(),
    "moved": lambda data: data.clone() * 1.5,
}


def of_tensors(path: str, module: nn.Module) -> Iterator[Mutation]:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        owner = "_parameters" if name in module._parameters else "_buffers"
        if tensor is None:
            wrong = nn.Parameter(torch.full((3,), 0.5))
            right = nn.Parameter(torch.full((module.weight.shape[0],), 0.5))
            for value in (wrong, right):
                yield Mutation(
                    f"{path}.{name} of {len(value)}",
                    lambda model, name=name, value=value: put(model.get_submodule(path)._parameters, name, value),
                )
            continue
        for title, view in VIEWS.items():

            def change(model: Any, name: str = name, owner: str = owner, view: Any = view) -> Callable[[], None]:
                tensor = getattr(model.get_submodule(path), owner)[name]
                before = tensor.data
                tensor.data = view(before)
                return lambda: setattr(tensor, "data", before)

            yield Mutation(f"{path}.{name} {title}", change)
        for value in (torch.nan, torch.inf, -torch.inf):

            def spoil(model: Any, name: str = name, owner: str = owner, value: float = value) -> Callable[[], None]:
                flat = getattr(model.get_submodule(path), owner)[name].data.view(-1)
                before = flat[3].clone()
                flat[3] = value
                return lambda: flat.__setitem__(3, before)

            yield Mutation(f"{path}.{name} holds {value}", spoil)

        def give_up(model: Any, name: str = name, owner: str = owner) -> Callable[[], None]:
            storage = getattr(model.get_submodule(path), owner)[name].untyped_storage()
            kept = storage.clone()  # others may lie in it
            storage.resize_(0)

            def undo() -> None:
                storage.resize_(kept.nbytes())
                storage.copy_(kept)

            return undo

        if isinstance(module, nn.Linear) and name == "weight":  # stock's elementwise operators crash, and biases do
            yield Mutation(f"{path}.{name} given up", give_up)
        yield Mutation(
            f"{path}.{name} is None",
            lambda model, name=name, owner=owner: put(getattr(model.get_submodule(path), owner), name, None),
        )


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method whose first result is 1.5 times that of `function`."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return (1.5 * found[0], *found[1:]) if isinstance(found, tuple) else 1.5 * found

    return changed


def of_methods(path: str, module: nn.Module) -> Iterator[Mutation]:
    for name in ("forward", "_norm"):
        if hasattr(type(module), name):
            yield Mutation(
                f"{path}.{name}",
                lambda model, name=name: put(
                    model.get_submodule(path), name, scaled(getattr(model.get_submodule(path), name))
                ),
            )
    for hooked in ("register_forward_hook", "register_forward_pre_hook"):

        def hook(model: Any, hooked: str = hooked) -> Callable[[], None]:
            is_after = hooked == "register_forward_hook"
            inner = model.get_submodule(path)
            call = lambda m, args, kwargs, *output: scaled(lambda: output[0])() if is_after else None  # noqa: E731
            return getattr(inner, hooked)(call, with_kwargs=True).remove  # type: ignore[no-any-return]

        yield Mutation(f"{path} {hooked}", hook)


def of_layer(model: Any, index: int = 1) -> list[Mutation]:
    """Return every change of one module of a layer at a time."""
    found: list[Mutation] = []
    root = f"model.layers.{index}"
    for path, module in model.get_submodule(root).named_modules(prefix=root):
        for kind in (of_attributes, of_tensors, of_methods):
            found += kind(path, module)
        if path != root:
            parent, _, name = path.rpartition(".")
            found.append(
                Mutation(
                    f"{path} exchanged", lambda m, p=parent, n=name: put(m.get_submodule(p)._modules, n, nn.Tanh())
                )
            )
    return found


def outcome(model: Any, tokens: int = 3) -> Any:
    """Return what a call gives: its text and where its logits are not finite, or the type of its error."""
    try:
        found = model.generate(
            **padded([4, 7]), max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    except Exception as error:
        return type(error)
    return found.sequences.tolist(), [(x.isnan().tolist(), x.isinf().tolist()) for x in found.logits]


def failures(stock: Any, ours: Any, mutations: list[Mutation], after: int = 40, tokens: int = 3) -> list[str]:
    """Return the changes that show in another way than on stock, or stay when they are taken back."""
    before, found = outcome(stock, tokens), []
    assert outcome(ours, tokens) == before
    for number, mutation in enumerate(mutations):
        undos = [mutation.make(model) for model in (stock, ours)]
        if outcome(stock, tokens) != outcome(ours, tokens):
            found.append(mutation.title)
        for undo in undos:
            undo()
        if number % after == 0 and outcome(ours, tokens) != before:
            found.append(f"after {mutation.title}")
    if outcome(ours, tokens) != before:
        found.append("after all")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("configs", [BLOCKS, PRODUCTS, SHARED], ids=["blocks", "products", "shared"])
@pytest.mark.parametrize("name", WALKED)
def test_every_change_of_a_layer(name: str, configs: list[Any]) -> None:
    stock = build(name)
    mutations = of_layer(stock)
    assert len(mutations) >= WALKED[name]
    if configs is SHARED and name == "phi3":
        pytest.skip("its projections are joined already")
    assert not failures(stock, optimised(stock, configs), mutations, after=1)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_some_changes_of_a_layer(name: str) -> None:
    stock = build(name)
    mutations = of_layer(stock)
    assert len(mutations) >= WALKED[name]
    assert not failures(stock, optimised(stock, BLOCKS), mutations[:: 3 if name == "llama" else 7])


PARTS = {
    "_attributes": "_kept_attributes", "_children": "_kept_children", "_owners": "_kept_owners",
    "_strides": "_strides", "_sizes": "_sizes", "_dtypes": "_dtypes", "_pointers": "_pointers", "_hooks": None,
}  # fmt: skip


class Anything(list[Any]):
    def __eq__(self, other: object) -> bool:
        return True


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_watch_is_needed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one part of the watch, some change of a layer is not seen."""
    make = watching.Watch.__init__

    def blind(self: Any, layer: Any, modules: Any) -> None:
        make(self, layer, modules)
        for name in {part, PARTS[part]} - {None}:
            kept = getattr(self, name)
            setattr(self, name, [] if part == "_hooks" else Anything(kept))

    monkeypatch.setattr(watching.Watch, "__init__", blind)
    stock = build("llama")
    wanted = {
        "_attributes": ["scaling", "variance_epsilon"], "_children": ["exchanged"], "_owners": ["is None"],
        "_strides": ["strided"], "_sizes": ["sliced"], "_dtypes": [], "_pointers": ["moved"],
        "_hooks": ["forward_hook"],
    }[part]  # fmt: skip
    mutations = [m for m in of_layer(stock) if any(m.title.endswith(w) or f".{w} = " in m.title for w in wanted)]
    if part == "_dtypes":
        stock = build("llama", torch.bfloat16)
        mutations = [Mutation("float16", half_as_other_half)]
    assert failures(stock, optimised(stock, BLOCKS), mutations)


def half_as_other_half(model: Any) -> Callable[[], None]:
    weight = model.model.layers[1].mlp.up_proj.weight
    before = weight.data
    weight.data = before.view(torch.float16)
    return lambda: setattr(weight, "data", before)


@pytest.mark.parametrize("part", ["look", "is_current"])
def test_surroundings_are_needed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner: Any = watching.Surroundings if part == "look" else BlockStep
    monkeypatch.setattr(owner, part, lambda self, *args: True)
    stock = build("llama")
    ours = optimised(stock, BLOCKS)
    monkeypatch.setattr(type(stock.model.layers[0].mlp), "forward", scaled(type(stock.model.layers[0].mlp).forward))
    assert outcome(ours) != outcome(stock)


@pytest.mark.parametrize("isa", native.supported_isas())
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_values_that_are_not_finite(name: str, isa: str) -> None:
    """In every dtype, one element of each tensor of a layer in turn; the slow walk has all of them and all kinds."""
    before = native.status().isa
    try:
        native.set_isa(isa)
        for number, dtype in enumerate(native.DTYPES):
            stock = build(name, dtype)
            mutations = [m for m in of_layer(stock) if " holds " in m.title]
            assert len(mutations) >= 33
            assert not failures(stock, optimised(stock, BLOCKS), mutations[number::5], tokens=2)
    finally:
        native.set_isa(before)
