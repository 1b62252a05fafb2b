"""Routers in one native call: as operators, their product, softmax and choice take a good part of a layer's time.

A router stays a module of its class, with its hooks; only its forward for few tokens is another. What it computes is
found by running it: the native call must choose what it chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.journal import beneath
from hf_accel.core.model.watching import Watch
from hf_accel.kernels import native
from hf_accel.ops import tolerances

_PROBES = 64  # tokens
_LARGEST_LOGIT = 4.0  # of theirs


class RouterStep:
    """The native call of one router, and the check that it still stands for the module."""

    def __init__(self, module: Any) -> None:
        """Raise ValueError with the reason if the native call cannot stand for `module`."""
        own = {name: tensor for name, tensor in module.named_parameters() if tensor is not None}
        weight, choices = own.get("weight"), getattr(module, "top_k", None)
        if set(own) - {"bias"} != {"weight"} or list(module.children()) or list(module.buffers()):
            raise ValueError("it is more than one product")
        if type(weight) is not Parameter or weight.dim() != 2 or type(choices) is not int:
            raise ValueError("it is no product with a number of experts to choose")
        if weight.dtype not in native.DTYPES or any(not t.is_cpu or t.dtype is not weight.dtype for t in own.values()):
            raise ValueError("its tensors do not lie on the CPU in one dtype that has native products")
        if not all(t.is_contiguous() and t.data_ptr() for t in own.values()):
            raise ValueError("its tensors do not lie in one piece of memory")
        self.original = type(module)
        self._forward = self.original.forward
        self._request = 0  # the call of `generate` in which everything was looked at
        self._watch = Watch(module, [])
        self.weight, self.bias, self.choices = weight, own.get("bias"), choices
        self.routing = self._found(module)

    @torch.no_grad()
    def _found(self, module: Any) -> native.Routing:
        """Return how the module makes weights, found on random tokens."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(_PROBES, self.weight.shape[1], generator=generator).to(self.weight.dtype)
        largest = (hidden.float() @ self.weight.float().T).abs().amax()
        hidden *= _LARGEST_LOGIT / largest.clamp_min(1e-30)  # where softmax is nearly one, norms of weights do not show
        try:
            expected = self._forward(module, hidden)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(f"it takes something else than hidden states ({error})") from error
        if not isinstance(expected, tuple) or len(expected) != 3 or not all(isinstance(x, Tensor) for x in expected):
            raise ValueError("it returns something else than logits, weights and ids")
        logits, weights, ids = expected
        kinds = {self.weight.dtype, torch.float32}
        if ids.dtype is not torch.int64 or not {logits.dtype, weights.dtype} <= kinds:
            raise ValueError("it returns logits, weights or ids of other dtypes")
        if not torch.equal(logits, logits.to(self.weight.dtype).to(logits.dtype)):
            raise ValueError("its logits have more digits than its weight")
        agreeing = [
            routing
            for normed in (False, True)
            if self._agrees(hidden, expected, routing := native.Routing(normed, logits.dtype, weights.dtype))
        ]
        if len(agreeing) != 1:
            raise ValueError("it chooses or weighs in none of the ways known here, or cannot be told to do in one")
        return agreeing[0]

    def _agrees(self, hidden: Tensor, expected: Sequence[Tensor], routing: native.Routing) -> bool:
        """Return whether the native call gives what the module gave for hidden [T, E], where logits do not tie."""
        rows = [native.route(row, self.weight, self.bias, self.choices, routing) for row in hidden.split(1)]
        decided = [place for place, row in enumerate(rows) if row is not None]
        if 2 * len(decided) <= len(rows):
            return False
        found = [torch.cat(parts) for parts in zip(*(row for row in rows if row is not None), strict=True)]
        return _agree(found, [part[decided] for part in expected], self.weight.dtype)

    def output(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return logits, weights and ids for hidden [..., E]; None if the native call does not cover this one."""
        columns = self.weight.shape[1]
        if (
            type(hidden) is not Tensor
            or hidden.dtype is not self.weight.dtype
            or hidden.shape[-1] != columns
            or not 0 < hidden.numel() <= native.MAX_ROWS * columns
            or not hidden.is_cpu
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
            or not self._is_current()
        ):
            return None
        rows = hidden.reshape(-1, columns).contiguous()
        return native.route(rows, self.weight, self.bias, self.choices, self.routing)

    def _is_current(self) -> bool:
        request = request_in_progress()
        if request is not None and request.number == self._request and self._watch.is_in_place():
            return True
        self._request = 0
        if self.original.forward is not self._forward or not self._watch.is_same():
            return False
        if request is not None:
            self._request = request.number
        return True


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return whether logits, weights and ids are the same; experts may differ only where rounding explains it.

    Every token has to: a choice within groups of experts, say, often is the choice among all.
    """
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    (logits, weights, ids), (stocks_logits, stocks_weights, stocks_ids) = found, expected
    bound, slack = tolerances.of_layer_output(dtype, False), max(2 * torch.finfo(dtype).eps, 1e-5)
    least, stocks_least = (logits.float().gather(1, chosen).amin(dim=1) for chosen in (ids, stocks_ids))
    if not (stocks_least >= least - slack * logits.float().abs().amax(dim=1)).all():
        return False
    (ids, order), (stocks_ids, stocks_order) = ids.sort(dim=1), stocks_ids.sort(dim=1)
    same = (ids == stocks_ids).all(dim=1)
    pairs = ((weights.gather(1, order)[same], stocks_weights.gather(1, stocks_order)[same]), (logits, stocks_logits))
    return bool(2 * same.sum() > len(same)) and all(_difference(*pair) < bound for pair in pairs)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


class NativeRouter:
    """Marks routers whose `forward` is a `router_forward`."""

    step: RouterStep


def router_forward(step: RouterStep) -> Callable[..., Any]:
    """Return the `forward` of a router: few tokens natively, all else as the class it is mixed over does."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = None if args or kwargs else step.output(hidden_states)
        if result is None:
            return beneath(NativeRouter, self, "forward")(hidden_states, *args, **kwargs)
        return result

    return forward
