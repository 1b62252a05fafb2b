"""Copies of a model that share its tensors: modules, configs and hooks of their own, no memory of weights.

Trials and timing run on such a copy, so that they neither call the user's hooks, nor leave anything in the user's
modules, nor meet what other threads do with the model meanwhile. Cost: some 10 ms for a model of a billion parameters.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_accel.core.model.undisturbed import FRESH

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# hooks of these belong to what a model computes; all others are the user's
LIBRARIES = frozenset({"transformers", "compressed_tensors", "accelerate", "peft"})


def shadow(model: nn.Module, shared: Iterable[nn.Module] = ()) -> Any:
    """Return a copy of `model` in evaluation mode that shares all its tensors, and the modules `shared` as they are.

    What it has of the user's hooks is in those modules: others would be shown what is no result of the model.
    """
    memo = {id(module): module for module in shared} | _kept(model)
    return copy.deepcopy(model, memo).eval()


def twin(model: nn.Module) -> Any:
    """Return a copy of `model` that shares all its tensors and has none of the user's hooks, as before its first call.

    Returns the model itself where it cannot be copied, or where another library keeps its weights in a form of its own.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and getattr(quantizer.quantization_config, "quant_method", None) != "hf_accel":
        return model
    try:
        made = copy.deepcopy(model, _kept(model)).eval()
    except Exception:  # whatever a foreign module's attributes raise when they are copied
        return model
    for module in made.modules():
        vars(module).update({name: value for name, value in FRESH.items() if name in vars(module)})
    return made


def has_users_hooks(module: nn.Module) -> bool:
    """Return whether something that the user hooked to a module, or to a part of it, is called when it runs."""
    return any(
        not _is_of_library(hook) for part in module.modules() for name in HOOKS for hook in getattr(part, name).values()
    )


def _kept(model: nn.Module) -> dict[int, Any]:
    """Return by `id` what copies do not copy: tensors, which they share, and hooks of the user's, which they lack."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    for module in model.modules():
        for name in HOOKS:
            hooks = getattr(module, name)
            if hooks and not all(map(_is_of_library, hooks.values())):
                memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_of_library(hook))
    return memo


def _is_of_library(hook: Any) -> bool:
    """Return whether a hook was put in place by a library that the model is made with, and not by the user."""
    function = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(function, "__module__", "")).partition(".")[0] in LIBRARIES


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))
    return itertools.chain(model.parameters(), model.buffers(), plain)
