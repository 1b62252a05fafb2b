"""Looks at every call whether a module of experts is still what its native call was made of."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.model.watching import Watch
from hf_accel.experts.offload.stored import StoredExperts, form_of

_NONE: frozenset[str] = frozenset()


class Guard:
    """One module over stored experts, which copies of a model share."""

    def __init__(self, stored: StoredExperts, module: Any) -> None:
        """Note what the module is now, with the class it is to have."""
        self._stored = stored
        self._note(module)

    def _note(self, module: Any) -> None:
        self._request = 0  # the call of `generate` in which everything was looked at
        self._watch = Watch(module, [child for child in module.children() if not isinstance(child, nn.ModuleList)])
        self._gate = getattr(type(module), "_apply_gate", None)
        self._products = _products(module) if self._stored.products is not None else []
        self._packed = [product.packed for product in self._products]
        # what packed experts keep for themselves: their own call, made when it is needed
        self._private = frozenset(name for name in vars(module) if name.startswith("_") and self._products)

    def holds(self, module: Any) -> bool:
        """Return whether module and weights are as they were; within a call of `generate` values are looked at once."""
        request = request_in_progress()
        if request is not None and request.number == self._request and self._watch.is_in_place():
            return bool(self._products) or self._stored.are_there()
        self._request = 0
        if self._watch.is_hooked() or not self._stored.are_there() or not self._has_products(module):
            return False
        is_same = self._watch.is_same_but(_NONE, self._private) if self._private else self._watch.is_same()
        if not (is_same and getattr(type(module), "_apply_gate", None) is self._gate) and not self._follows(module):
            return False
        if request is not None:
            self._request = request.number
        return True

    def _has_products(self, module: Any) -> bool:
        """Return whether packed experts have the products they had, with nothing hooked to them."""
        if not self._products:
            return True
        products = _products(module)
        return (
            products == self._products
            and [product.packed for product in products] == self._packed
            and not any(product._forward_hooks or product._forward_pre_hooks for product in products)
        )

    def _follows(self, module: Any) -> bool:
        """Note anew what the module is, if it still computes the same."""
        try:
            is_same = form_of(module) == self._stored.form
        except (ValueError, AttributeError, TypeError, KeyError, RuntimeError):
            is_same = False
        if is_same:
            self._note(module)
        return is_same


def _products(module: Any) -> list[Any]:
    return list(chain(module._modules["gate_up_proj"], module._modules["down_proj"]))
