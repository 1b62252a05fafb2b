"""The decoder layers of a model, run one at a time on calibration text.

A layer is called as its model called it, with the masks and positions recorded then. That is right only where rows of
one length are called alike and each layer reads what the one before it gave, which is tried before it is relied on;
models of another kind are observed as a whole. Cost: two forward passes over one row each, and none afterwards but the
layers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.ops.tolerances import of_text_logits

_HERE = object()  # stands for what is read
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class Layer:
    """A decoder layer called `path`, and how its model calls it for one row."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, inputs: Tensor) -> Tensor:
        """Return what the layer gives [1, T, E] for inputs [1, T, E]."""
        args = tuple(inputs if value is _HERE else value for value in self.args)
        kwargs = {name: inputs if value is _HERE else value for name, value in self.kwargs.items()}
        return _first(self.module(*args, **kwargs))


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Tensor
    outputs: Tensor | None = None


def layers_of(model: Any, ids: Tensor) -> tuple[list[Layer], str]:
    """Return the decoder layers of `model` in their order; none, and why, where they cannot be run by themselves.

    ids [N, T]: the text; the first and the last of its rows are read.
    """
    modules = _candidates(model)
    if not modules:
        return [], "it has no list of decoder layers"
    first, last = _recorded(model, modules, ids[:1]), _recorded(model, modules, ids[-1:])
    names = list(modules)
    if not all(len(calls) == 1 for found in (first, last) for calls in (found.get(name, []) for name in names)):
        return [], "a decoder layer is not called once in each forward pass"
    layers = []
    for index, name in enumerate(names):
        one, two = first[name][0], last[name][0]
        if not (_is_equal(one.args, two.args) and _is_equal(one.kwargs, two.kwargs)):
            return [], f"{name} is called with more than its input that depends on the text"
        layer = Layer(name, modules[name], one.args, one.kwargs)
        after = first[names[index + 1]][0].inputs if index + 1 < len(names) else None
        if reason := _objection(layer, one, after):
            return [], reason
        layers.append(layer)
    return layers, ""


def first_inputs(model: Any, layers: Sequence[Layer], row: Tensor) -> Tensor:
    """Return what the first layer reads [1, T, E] when `model` reads a row of ids [1, T]; nothing else is run."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    hook = layers[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(row, use_cache=False)
    except _Stop:
        pass
    finally:
        hook.remove()
    return found[0]


class _Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


def _candidates(model: Any) -> dict[str, nn.Module]:
    """Return path -> module of the list of modules that holds most of the model's parameters."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    # of two that hold as much, as where one layer has one list, the outer one
    best = max(sizes, key=lambda path: (sizes[path], -path.count(".")), default=None)
    return {} if best is None else {f"{best}.{name}": module for name, module in lists[best].named_children()}


def _recorded(model: Any, modules: dict[str, nn.Module], row: Tensor) -> dict[str, list[_Call]]:
    found: dict[str, list[_Call]] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(inputs, Tensor):
            return
        if args:
            args = (_HERE, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": _HERE}
        found.setdefault(name, []).append(_Call(args, kwargs, inputs.detach().clone()))

    def after(name: str, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if name in found and isinstance(_first(outputs), Tensor):
            found[name][-1].outputs = _first(outputs).detach().clone()

    hooks: list[Any] = []
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(after, name)))
        with torch.no_grad():
            model(row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _objection(layer: Layer, call: _Call, after: Tensor | None) -> str:
    """Return why a layer is not run by itself, or ""; `after`: what the next one reads."""
    if call.outputs is None:
        return f"{layer.path} gives no tensor"
    with torch.no_grad():
        found = layer.run(call.inputs)
    if not _is_close(found, call.outputs):
        return f"{layer.path} computes something else by itself than in its model"
    if after is not None and not _is_close(after, call.outputs):
        return f"the layer after {layer.path} reads something else than what that gives"
    return ""


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return found.shape == expected.shape  # what is not finite is named where it is observed
    return float((found - expected).norm()) <= of_text_logits(expected.dtype) * float(expected.norm())


def _is_equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(map(_is_equal, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_is_equal(one[key], two[key]) for key in one)
    return one is two or (isinstance(one, _PLAIN) and type(one) is type(two) and one == two)


def _first(outputs: Any) -> Any:
    """Return what a layer gives to the next; other things may come beside it."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
