"""What the results of modules depend on beside their inputs, and whether it is still as it was.

There is one list, which native layers and stored prompts ask: a module's own attributes, children, tensors and hooks
(`Watch`), and the classes and functions that its forward runs through, which are the whole process's (`Surroundings`).
Comparisons run in C: dictionaries compare entry by entry, and an entry that is the same object without a call.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable
from functools import partial
from itertools import chain, count
from operator import itemgetter
from types import FunctionType, MethodType, NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from hf_accel.core.model.back_ends import BACK_ENDS

FUNCTIONS = itemgetter("linear", "silu", "gelu", "relu", "softmax", "scaled_dot_product_attention", "dropout", "conv1d",
                       "softplus")  # fmt: skip
# what Python writes into namespaces by itself, torch.compile into nn.Module (the three before the last) and
# transformers into classes (the last), where no forward runs through it
BOOKKEEPING = {"__doc__", "__annotations__", "__annotations_cache__", "__annotate_func__", "__warningregistry__",
               "___needs_generation_tag_patch", "__init__", "__setstate__",
               "_can_set_attn_implementation_cached_value"}  # fmt: skip

_data_ptr, _stride, _size = torch.Tensor.data_ptr, torch.Tensor.stride, torch.Tensor.size
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


class Surroundings:
    """The classes of some modules and the functions their forwards call, as they were when this was made."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._spaces = [*map(vars, kinds_of(modules)), *namespaces_of(modules)]
        self._kept = [dict(space) for space in self._spaces]
        self._functions = _functions()
        self._index = sys.maxsize
        self._is_same = True
        self.changed: set[int] = set()  # which of those that ask this are not as they were themselves

    def hold(self, index: int) -> bool:
        """Return whether they are the same still; looked at once per forward pass, in which `index` goes up."""
        if index <= self._index:
            self._is_same = self.look()
        self._index = index
        return self._is_same

    def look(self) -> bool:
        """Return whether they are the same at this moment."""
        try:
            is_same = self._spaces == self._kept
        except (RuntimeError, TypeError, ValueError):  # a value that does not compare
            is_same = False
        return _functions() == self._functions and (is_same or self._are_alike())

    def _are_alike(self) -> bool:
        for index, (space, kept) in enumerate(zip(self._spaces, self._kept, strict=True)):
            if names := differing(space, kept):
                if not all(map(_is_bookkeeping, names)):
                    return False
                self._kept[index] = dict(space)
        return True


def _is_bookkeeping(name: str) -> bool:
    """Return whether Python or torch writes under this name; code that torch.compile has made has globals of its own.

    Those begin with two underscores and do not end with two, as `__compiled_fn_1`, or with a number, as `_1403_c18`:
    nobody else's forward reads them.
    """
    is_compiled = name.startswith("__") and not name.endswith("__")
    return name in BOOKKEEPING or is_compiled or (name[:1] == "_" and name[1:2].isdigit())


def kinds_of(modules: Iterable[nn.Module]) -> list[type]:
    """Return the classes of the modules and those they inherit from, in a fixed order."""
    return list(dict.fromkeys(kind for module in modules for kind in type(module).__mro__ if kind is not object))


def namespaces_of(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Return the globals of the files where those classes are written: functions that their forwards call."""
    names = dict.fromkeys(kind.__module__ for kind in kinds_of(modules))
    found = [vars(sys.modules[name]) for name in names if name.startswith("transformers.") and name in sys.modules]
    return [*found, vars(sdpa_attention)]


def _functions() -> tuple[Any, ...]:
    """Return the functions that forwards call, attention as modules look it up by name at every call."""
    return (*FUNCTIONS(vars(functional)), *map(ALL_ATTENTION_FUNCTIONS.get, BACK_ENDS))


def simple_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the attributes of a module that are values, and numbers for its functions, which no other one gets."""
    return [
        (name, _number(value) if isinstance(value, (FunctionType, MethodType, partial)) else value)
        for name, value in vars(module).items()
        if isinstance(value, (str, int, float, tuple, FunctionType, MethodType, partial, NoneType))
    ]


def _number(function: Any) -> str:
    if isinstance(function, partial):
        return f"{_number(function.func)} with {function.args} {sorted(function.keywords.items())}"
    owner = getattr(function, "__func__", function)
    if _is_of_library(owner):  # the same in every process
        return f"{owner.__module__}.{owner.__qualname__}"
    return f"function {_numbers.setdefault(owner, next(_counter))} of {PROCESS}"


def _is_of_library(function: Any) -> bool:
    """Return whether a function is what torch or transformers has under its name."""
    module = str(getattr(function, "__module__", ""))
    found: Any = sys.modules.get(module) if module.partition(".")[0] in ("torch", "transformers") else None
    for part in str(getattr(function, "__qualname__", "")).split("."):
        found = getattr(found, part, None)
    return getattr(found, "__func__", found) is function


PROCESS = secrets.token_hex(16)  # of which functions and hooks are, that files cannot tell apart
_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_counter = count()


def differing(one: Any, other: Any) -> set[str]:
    """Return the names under which two namespaces hold different things."""
    absent = object()
    return {name for name in {*one, *other} if not _is_same(one.get(name, absent), other.get(name, absent))}


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return not isinstance(one, torch.Tensor) and type(one) is type(other) and bool(one == other)
    except (RuntimeError, TypeError, ValueError):
        return False


class Watch:
    """The state of the modules inside `layer`: attributes, children, hooks, which tensors they hold and how these lie.

    The layer's own hooks and class are not watched, as it runs them itself. Raises: RuntimeError for tensors without
    memory.
    """

    def __init__(self, layer: nn.Module, modules: list[nn.Module]) -> None:
        everything = [layer, *modules]
        self._modules = modules
        self._kinds = [type(module) for module in modules]
        self._attributes = [module.__dict__ for module in everything]
        self._counts = list(map(len, self._attributes))
        self._kept_attributes = [dict(attributes) for attributes in self._attributes]
        self._children = [module._modules for module in everything]
        self._kept_children = [dict(children) for children in self._children]
        owners = [owner for module in everything for owner in (module._parameters, module._buffers)]
        self._owners = [owner for owner in owners if owner]
        self._kept_owners = [dict(owner) for owner in self._owners]
        self._tensors = [t for owner in self._owners for t in owner.values() if t is not None]
        # comparing dictionaries takes a tensor of one element for another one that is equal
        self._single = [(o, name, t) for o in self._owners for name, t in o.items() if t is not None and t.numel() < 2]
        self._pointers, self._strides, self._sizes, self._dtypes = (
            list(map(read, self._tensors)) for read in (_data_ptr, _stride, _size, _dtype)
        )
        self._hooks = list(chain.from_iterable((m._forward_hooks, m._forward_pre_hooks) for m in modules))
        # hooks on every module of the process, which torch keeps in two dictionaries for good
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]

    def is_hooked(self) -> bool:
        """Return whether a forward would call anything beside the modules' own."""
        return are_hooked(self._hooks)

    def is_in_place(self) -> bool:
        """Return whether nothing was hooked, exchanged, added or moved: what may go on within a call of `generate`.

        It is asked at every token, where fetching the values of all attributes would show.
        """
        try:
            return (
                not self.is_hooked()
                and self._children == self._kept_children
                and list(map(type, self._modules)) == self._kinds
                and list(map(len, self._attributes)) == self._counts
                and self._owners == self._kept_owners
                and list(map(_data_ptr, self._tensors)) == self._pointers
            )
        except (RuntimeError, TypeError, ValueError, KeyError):  # what is no longer the same may not even compare
            return False

    def is_same(self) -> bool:
        """Return whether everything but hooks is as it was: the same tensors, in place, of the same layout."""
        try:
            return (
                self._attributes == self._kept_attributes
                and self._children == self._kept_children
                and self._owners == self._kept_owners
                and not (self._single and any(owner[name] is not tensor for owner, name, tensor in self._single))
                and list(map(type, self._modules)) == self._kinds
                and list(map(_data_ptr, self._tensors)) == self._pointers
                and self._have_their_layouts()
            )
        except (RuntimeError, TypeError, ValueError, KeyError):
            return False

    def _have_their_layouts(self) -> bool:
        return (
            list(map(_stride, self._tensors)) == self._strides
            and list(map(_size, self._tensors)) == self._sizes
            and list(map(_dtype, self._tensors)) == self._dtypes
        )

    def has_its_modules(self) -> bool:
        """Return whether no module was exchanged or given another class."""
        return self._children == self._kept_children and list(map(type, self._modules)) == self._kinds

    def is_same_but(
        self, names: frozenset[str], of_the_layer: frozenset[str], exchanged: frozenset[str] = frozenset()
    ) -> bool:
        """Return whether modules, children and all attributes but `names` are as they were, whatever tensors are.

        of_the_layer: further names, of the layer's own attributes. exchanged: children of the layer that may be others.
        """
        first, *rest = map(differing, self._attributes, self._kept_attributes)
        children, *others = map(differing, self._children, self._kept_children)
        return (
            children <= exchanged
            and not any(others)
            and list(map(type, self._modules)) == self._kinds
            and list(map(set, self._owners)) == list(map(set, self._kept_owners))
            and first <= names | of_the_layer
            and all(changed <= names for changed in rest)
        )


def are_hooked(hooks: list[Any]) -> bool:
    """Return whether dictionaries of hooks hold any that would do something."""
    return any(hooks) and not all(map(_are_idle_recorders, hooks))


def _are_idle_recorders(hooks: Any) -> bool:
    """transformers leaves its recording hooks on for good; they do nothing unless outputs are being recorded."""
    if hooks and output_capturing._active_collector.get():  # None outside a forward, empty in one that records nothing
        return False
    return all(getattr(hook, "__module__", "") == output_capturing.__name__ for hook in hooks.values())
