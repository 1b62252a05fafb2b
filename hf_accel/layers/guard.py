"""Watches the modules inside a layer that runs natively: whatever a user changes there must be seen, at every call.

A native call bypasses the modules inside the layer. So before each one the guard looks whether a module was exchanged
(an adapter put in), hooked, given another class or `forward` (parametrizations do), or a weight moved. About 4 µs for
a Llama layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers.utils import output_capturing


class Guard:
    """The state of the modules inside `layer` when a native call was built for it. Its own hooks run by themselves."""

    def __init__(self, layer: nn.Module, modules: list[nn.Module]) -> None:
        self._parameters = [
            (own, name, tensor, tensor.data_ptr())
            for module in modules
            for own in (module._parameters, module._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]
        self._children = [(module._modules, dict(module._modules)) for module in (layer, *modules)]
        self._classes = [(module, type(module)) for module in modules]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        # hooks on every module of the process, which torch keeps in two dictionaries for good
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._attributes = [module.__dict__ for module in modules]

    def is_in_place(self) -> bool:
        """Return whether every weight is the same tensor at the same address."""
        for own, name, parameter, pointer in self._parameters:
            if own.get(name) is not parameter or parameter.data_ptr() != pointer:
                return False
        return True

    def is_plain(self) -> bool:
        """Return whether no module was exchanged, hooked or given a class or a `forward` of its own."""
        for hooks in self._hooks:
            if hooks and not _are_idle_recorders(hooks):
                return False
        for own, children in self._children:
            if own != children:
                return False
        for module, cls in self._classes:
            if type(module) is not cls:
                return False
        for attributes in self._attributes:
            if "forward" in attributes:
                return False
        return True


def _are_idle_recorders(hooks: Any) -> bool:
    """transformers leaves its recording hooks on for good; they do nothing unless outputs are being recorded."""
    if output_capturing._active_collector.get():  # None outside a forward, empty in one that records nothing
        return False
    return all(getattr(hook, "__module__", "") == output_capturing.__name__ for hook in hooks.values())
