"""Runs the decoder of a copy of a model once, and keeps what its layers, their modules and their attention were given.

Cost: a forward pass of a few tokens; what is kept of a layer is given up when the next one has run.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_accel.core.model.discovery.bounds import unobserved
from hf_accel.core.model.discovery.hearing import Ear, Heard, hearing, listener

TOKENS = 7


@dataclass
class Call:
    """One call of a module within a layer: its path, and copies of the first tensor it was given and returned.

    given_at, returned_at: where these lay; nothing else did as long as the layer ran.
    """

    path: str
    module: nn.Module
    given: Tensor
    returned: Tensor
    given_at: int
    returned_at: int


@dataclass
class Recorded:
    """What one decoder layer was given and returned.

    given_at: where the hidden states lay. arguments: by name, without these. output: as its forward returned it. calls:
    of the modules within, in order of their ends. clamps: for each time that values were clamped, the modules that ran
    then: whether they are shows only where they are large, which those of a few random tokens may not be.
    """

    path: str
    layer: Any
    given: Tensor
    arguments: dict[str, Any]
    output: Any
    returned: Tensor
    given_at: int
    calls: list[Call] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    clamps: list[list[nn.Module]] = field(default_factory=list)


def stacks(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the members of the outermost lists of modules in a decoder, with their paths."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other, _ in found):
            found += [(f"{path}.{index}" if path else str(index), child) for index, child in enumerate(module)]
    return found


def decoder_of(model: Any) -> Any:
    """Return the part of a model that is its decoder, or the model without its head."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def listen(model: Any, use: Callable[[Recorded], None], start: int = 0) -> None:
    """Run the decoder of `model`, a copy, on two rows of random tokens; `use` gets each member of its lists of modules.

    The first row begins with padding, so that masks and positions matter. Where angles come by axis, as of images,
    every axis has positions of its own. start: the position of the first token.
    """
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embeddings.shape[0], (2, TOKENS), generator=generator).to(embeddings.device)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": True}
    if start:
        inputs["position_ids"] = start + (mask.cumsum(-1) - 1).clamp(min=0)

    def use_plain(record: Recorded) -> None:
        if axes := axes_of(record.arguments):
            raise _ByAxis(axes)
        use(record)

    with hearing(model), torch.no_grad():
        decoder = decoder_of(model)
        try:
            _run(decoder, inputs, use_plain)
        except _ByAxis as found:
            _run(decoder, inputs | {"position_ids": positions_apart(found.axes, TOKENS, start).to(tokens.device)}, use)


def positions_apart(axes: int, tokens: int, start: int = 0) -> Tensor:
    """Return positions [axes, 2, tokens] from `start` on of which no axis has those of another."""
    return start + torch.randint(0, 50, (axes, 2, tokens), generator=torch.Generator().manual_seed(1))


class _ByAxis(Exception):
    """Ends a run in which positions of several axes were the same."""

    def __init__(self, axes: int) -> None:
        self.axes = axes


def axes_of(arguments: dict[str, Any]) -> int:
    """Return by how many axes of positions a layer's angles come; 0 where by one."""
    angles = arguments.get("position_embeddings")
    return int(angles[0].shape[0]) if isinstance(angles, tuple) and angles[0].dim() == 4 else 0


def _run(decoder: nn.Module, inputs: dict[str, Any], use: Callable[[Recorded], None]) -> None:
    thread, hooks = threading.get_ident(), []
    state: list[Recorded] = []  # of the layer that runs

    def begin(path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            arguments = bound(type(layer), args, kwargs)
            given = arguments.pop(hidden_name(layer), None)
            if _is_hidden(given):
                state[:] = [Recorded(path, layer, given.clone(), arguments, None, given, _place(given))]
                heard.clear()
                clamps.clear()
                alive.clear()

    def end(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == thread and state and state[0].layer is layer:
            record = state.pop()
            record.output, record.heard, record.clamps = output, [*heard], [*clamps]
            first = output[0] if isinstance(output, tuple) and output else output
            if _is_hidden(first):
                record.returned = first.clone()
                with unobserved():
                    use(record)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread and state:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            alive.extend(tensors[:1])
            waiting.append((module, tensors[0].clone() if tensors else None, _place(tensors[0]) if tensors else 0))

    def after(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == thread and state and waiting:
            owner, given, place = waiting.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if owner is module and given is not None and isinstance(first, Tensor):
                alive.append(first)
                rows = _in_rows(given), _in_rows(first.clone())
                state[0].calls.append(Call(path, module, *rows, place, _place(first)))

    heard: list[Heard] = []
    clamps: list[list[nn.Module]] = []
    waiting: list[tuple[nn.Module, Tensor | None, int]] = []
    alive: list[Tensor] = []  # of the layer that runs, so that no two tensors lie in one place
    token = listener.set(heard)
    try:
        for path, layer in stacks(decoder):
            hooks.append(layer.register_forward_pre_hook(partial(begin, path), with_kwargs=True))
            for name, module in layer.named_modules():
                if name:
                    hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.append(module.register_forward_hook(partial(after, name)))
            hooks.append(layer.register_forward_hook(end))
        with Ear(waiting, clamps):
            decoder(**inputs)
    finally:
        listener.reset(token)
        for hook in hooks:
            hook.remove()


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _in_rows(value: Tensor) -> Tensor:
    """Return a tensor [B, T, ...] of what some models make flat."""
    return value.view(2, TOKENS, *value.shape[1:]) if value.shape[:1] == (2 * TOKENS,) else value


def _is_hidden(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (2, TOKENS) and value.is_floating_point()
    )


def hidden_name(layer: Any) -> str:
    """Return the name of the first argument of a layer's forward, which is its hidden states."""
    return next(iter(_names(type(layer))), "hidden_states")


def bound(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of a layer of this class by name."""
    return dict(zip(_names(kind), args)) | kwargs


def _positional(kind: Any) -> tuple[str, ...]:
    parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


_names: Callable[[Any], tuple[str, ...]] = functools.cache(_positional)
