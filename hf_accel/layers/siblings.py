"""Sibling projections that read one input (q/k/v, gate/up) share one product, without a change to any forward.

The joined weight owns the storage and the originals become views of it: no extra memory, `state_dict` keeps its
names. The first sibling called with an input computes the joint product; the others take their part of it. Three
small kernels become one, which pays where launching costs (GPU decoding) or the library's own group product is absent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.journal import Journal, beneath, subclass
from hf_accel.core.model.anatomy import Siblings
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting

_FORWARD = nn.Linear.forward  # where another has been put in its place since, that one is to run


@dataclass(frozen=True, kw_only=True)
class SharedProjectionConfig(Config):
    """q/k/v and gate/up projections computed as one product each, on views of one joined weight.

    max_rows: inputs of up to this many rows (batch x query tokens) share a product. Larger ones gain nothing: the
        product itself dominates there, and its parts would not be contiguous.
    """

    max_rows: int = 16

    def __post_init__(self) -> None:
        self.check_integer("max_rows", 1)


class SharedProjectionPatcher(Patcher[SharedProjectionConfig], config=SharedProjectionConfig):
    stage = Stage.PRODUCTS
    fidelity = Fidelity.EXACT
    occupies = "linear products"  # a sibling's forward is one product: natively alone, or joined, not both

    def obstacles(self, setting: Setting) -> list[str]:
        if not setting.anatomy.siblings():
            return ["no separate q/k/v or gate/up projections without adapters were found."]
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        groups = setting.anatomy.siblings()
        skipped = []
        joined = 0
        for siblings in groups:
            modules = [siblings.parent._modules[name] for name in siblings.names]
            if reason := _obstacle(modules):
                skipped.append(f"{'/'.join(siblings.names)}: {reason}")
                continue
            _join(siblings, self.config.max_rows, host.journal)
            joined += 1
        return Change(f"{joined} groups of projections share one product each", 0, tuple(dict.fromkeys(skipped)))


def _obstacle(modules: list[Any]) -> str | None:
    if len({(m.weight.dtype, m.weight.device, m.weight.shape[1]) for m in modules}) > 1:
        return "the weights differ in dtype, device or input size"
    if len({m.bias is None for m in modules}) > 1:
        return "only some have a bias"
    if len({m.weight.untyped_storage().data_ptr() for m in modules}) < len(modules):
        return "the weights share storage already"
    return None


def _join(siblings: Siblings, max_rows: int, journal: Journal) -> None:
    modules: list[nn.Linear] = [siblings.parent._modules[name] for name in siblings.names]  # type: ignore[misc]
    group = Group(modules, max_rows)
    for index, module in enumerate(modules):
        journal.swap_class(
            module, subclass(SharedProduct, type(module), group=group, forward=shared_forward(group, index))
        )
    journal.did(group.split)


class Group:
    """One joined weight, and per thread the joint product of the input seen last."""

    def __init__(self, modules: list[nn.Linear], max_rows: int) -> None:
        self.modules, self.max_rows = modules, max_rows
        self.parts: dict[str, tuple[torch.Tensor, ...]] = {}
        self.rows = [module.weight.shape[0] for module in modules]
        self.weight = self._joined("weight")
        self.bias = self._joined("bias") if modules[0].bias is not None else None
        self.latest = threading.local()

    def _joined(self, name: str) -> torch.Tensor:
        parameters = [module._parameters[name] for module in self.modules]
        joined = torch.cat([p.detach() for p in parameters if p is not None])
        self.parts[name] = joined.split(self.rows)
        for parameter, part in zip(parameters, self.parts[name], strict=True):
            parameter.data = part  # type: ignore[union-attr]
        return joined

    def is_joined(self) -> bool:
        """Return whether every weight still is its view: `.to`, `load_state_dict(assign=True)` and others end it."""
        return self._holds("weight", self.weight) and self._holds("bias", self.bias)

    def _holds(self, name: str, joined: torch.Tensor | None) -> bool:
        for module, part in zip(self.modules, (None,) * len(self.rows) if joined is None else self.parts[name]):
            parameter = module._parameters.get(name)
            if parameter is None or part is None:
                if parameter is not part or name not in module._parameters:
                    return False
            elif parameter.dtype is not part.dtype or not parameter.is_set_to(part):  # memory, shape and strides
                return False
        return True

    def split(self) -> None:
        """Give each weight storage of its own again, bit-equal."""
        for module in self.modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.clone()

    def product(self, index: int, input: torch.Tensor) -> torch.Tensor | None:
        """Return the part of sibling `index`, [..., rows]; None if it must be computed alone."""
        latest = self.latest
        if index == 0:
            latest.parts = torch.nn.functional.linear(input, self.weight, self.bias).split(self.rows, dim=-1)
            latest.input, latest.version = input, input._version
            return latest.parts[0]
        if getattr(latest, "input", None) is not input or latest.version != input._version:
            return None
        part = latest.parts[index]
        if index == len(self.rows) - 1:
            latest.input = latest.parts = None
        return part


class SharedProduct:
    """Marks products that are one of a group of siblings, whose `forward` is a `shared_forward`."""

    group: Group


def shared_forward(group: Group, index: int) -> Callable[..., torch.Tensor]:
    """Return the `forward` of sibling `index`. What it needs is bound: another thread may put the class back."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if (
            input.numel() <= group.max_rows * input.shape[-1]
            and not torch.is_grad_enabled()
            and not torch.is_inference(input)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.is_autocast_enabled(input.device.type)
            and input.dtype is group.weight.dtype
            and nn.Linear.forward is _FORWARD
            and group.is_joined()
        ):
            part = group.product(index, input)
            if part is not None:
                return part
        return beneath(SharedProduct, self, "forward")(input)  # type: ignore[no-any-return]

    return forward
