"""Runs a model without leaving a trace in it, and without finding one of an earlier call.

Some forward passes keep what they learn in the model: Qwen2-VL the offset of its positions, rotary embeddings of type
dynamic the longest text so far and the frequencies that belong to it. A trial must neither depend on what a call of
the user's has left there nor hand on anything to the next. Cost: a dictionary per module, and a copy of small buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

COPIED_BYTES = 2**16  # larger tensors are weights, which no forward pass writes to
STRUCTURE = frozenset(vars(nn.Module()))  # parts and hooks: no forward pass changes those
FRESH: dict[str, Any] = {"rope_deltas": None}  # what an earlier call left -> what there is before the first


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block on `model` as if no call had been before, and put back what forward passes change in modules.

    Attributes and buffers that they set are as before afterwards, and so are the values of small tensors and the
    entries of lists and dictionaries. What the block itself makes of the model's parts and hooks stays.
    """
    states = [_State.of(module) for module in model.modules()]
    for state in states:
        for name, value in FRESH.items():
            if name in state.attributes:
                vars(state.module)[name] = value
    try:
        yield
    finally:
        for state in states:
            state.put_back()


@dataclass
class _State:
    """What one module holds beside its parts."""

    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, torch.Tensor | None]
    copies: list[tuple[torch.Tensor, torch.Tensor]]  # (tensor, its values)
    containers: list[tuple[Any, Any]]  # (list or dictionary, its entries)

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        attributes = {name: value for name, value in vars(module).items() if name not in STRUCTURE}
        buffers = dict(module._buffers)
        tensors = [value for value in (*attributes.values(), *buffers.values()) if isinstance(value, torch.Tensor)]
        small = [tensor for tensor in tensors if tensor.numel() * tensor.element_size() <= COPIED_BYTES]
        copies = [(tensor, tensor.detach().clone()) for tensor in small if type(tensor) is torch.Tensor]
        containers = [(value, value.copy()) for value in attributes.values() if type(value) in (list, dict, set)]
        return cls(module, attributes, buffers, copies, containers)

    def put_back(self) -> None:
        now = vars(self.module)
        for name in [name for name in now if name not in STRUCTURE and name not in self.attributes]:
            del now[name]
        now.update(self.attributes)
        if not _is_same(self.module._buffers, self.buffers):
            self.module._buffers.clear()
            self.module._buffers.update(self.buffers)
        for container, entries in self.containers:
            if not _is_same(container, entries):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(entries)
        for tensor, values in self.copies:
            if not torch.equal(tensor, values):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(values)


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two containers hold the same objects; equality would ask tensors."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(one[key] is other[key] for key in one)
    if isinstance(one, set):
        return one == other  # type: ignore[no-any-return]
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
