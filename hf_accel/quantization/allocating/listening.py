"""What modules of experts are given while a model reads text: hidden states, and where the router sends them.

Memory: the hidden states of the rows that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Given:
    """What experts are given of some rows of the text: hidden states [T, E], ids and weights [T, k], call by call."""

    hidden: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the hidden states [n, E] and the weights [n, 1] of the tokens that an expert is sent."""
        if not self.hidden:
            return torch.empty(0, 0), torch.empty(0, 1)
        hidden, ids, weights = (torch.cat(parts) for parts in (self.hidden, self.ids, self.weights))
        token, place = torch.where(ids == expert)
        return hidden[token], weights[token, place, None]


class Listener:
    """Keeps what modules of experts, by path, are given within the block while `keeps` is set; see `given`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.given = {path: Given() for path in modules}
        self.keeps = True
        self._modules = modules
        self._hooks: list[Any] = []

    def __enter__(self) -> Listener:
        for path, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(partial(self._keep, path)))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.keeps:
            given = self.given[path]
            for parts, part in zip((given.hidden, given.ids, given.weights), args, strict=True):
                parts.append(part.detach())
