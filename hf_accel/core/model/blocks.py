"""A decoder layer of a model, part by part, as discovery describes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_accel.core.model.discovery.discovering import Forms, forms_of
from hf_accel.core.model.discovery.forms import BlockForm, Rows
from hf_accel.kernels.native import Heads


@dataclass(frozen=True)
class LinearSlice:
    """A projection: rows [start, stop) of the product `module`, the child `name` of `parent`."""

    parent: nn.Module
    name: str
    start: int
    stop: int

    @property
    def module(self) -> nn.Module:
        return self.parent._modules[self.name]  # type: ignore[return-value]


@dataclass(frozen=True)
class DecoderBlock:
    """One decoder layer of a model, at `path` in it, and what it is made of.

    feed_forward: the module that follows attention where it is no plain feed-forward part; gate, up and down are None
    then. q, k, v: None where their heads do not lie together.
    """

    path: str
    layer: nn.Module
    form: BlockForm

    @property
    def index(self) -> int:
        return self.form.index

    @property
    def heads(self) -> int:
        return self.form.heads

    @property
    def kv_heads(self) -> int:
        return self.form.kv_heads

    @property
    def head_dim(self) -> int:
        return self.form.head_dim

    @cached_property
    def attention(self) -> nn.Module:
        return self.layer.get_submodule(self.form.attention)

    @cached_property
    def feed_forward(self) -> nn.Module | None:
        return None if self.form.feed_forward is None else self.layer.get_submodule(self.form.feed_forward)

    @cached_property
    def projections(self) -> tuple[LinearSlice, ...]:
        """The products that read what attention reads; their rows one after the other are the projected row."""
        return tuple(self._whole(path) for path in self.form.projections)

    @cached_property
    def o(self) -> LinearSlice:
        return self._whole(self.form.o)

    @cached_property
    def q(self) -> LinearSlice | None:
        return self._together(self.form.q, self.heads)

    @cached_property
    def k(self) -> LinearSlice | None:
        return self._together(self.form.k, self.kv_heads)

    @cached_property
    def v(self) -> LinearSlice | None:
        return self._together(self.form.v, self.kv_heads)

    @cached_property
    def gate(self) -> LinearSlice | None:
        return self._rows(self.form.gate)

    @cached_property
    def up(self) -> LinearSlice | None:
        return self._rows(self.form.up)

    @cached_property
    def down(self) -> LinearSlice | None:
        return None if self.form.down is None else self._whole(self.form.down)

    def norm(self, name: str) -> nn.Module | None:
        """Return the norm called "input", "attention_out", "mlp", "mlp_out", "q", "k" or "v"; None: there is none."""
        form = self.form.norms.get(name)
        return None if form is None else self.layer.get_submodule(form.path)

    @property
    def modules(self) -> list[nn.Module]:
        """Every module inside the layer that computes something; not the layer itself, nor `feed_forward`."""
        others = set() if self.feed_forward is None else set(self.feed_forward.modules())
        return [module for module in self.layer.modules() if module is not self.layer and module not in others]

    def _rows(self, rows: Rows | None) -> LinearSlice | None:
        if rows is None:
            return None
        parent, _, name = rows.path.rpartition(".")
        return LinearSlice(self.layer.get_submodule(parent), name, rows.start, rows.stop)

    def _whole(self, path: str) -> LinearSlice:
        found = self._rows(Rows(path, 0, product_rows(self.layer.get_submodule(path))))
        return found  # type: ignore[return-value]

    def _together(self, where: Heads, count: int) -> LinearSlice | None:
        group = count // self.kv_heads
        start, stop, before = where.start, where.start + count * self.head_dim, 0
        if count > 1 and (where.stride != group * self.head_dim or (group > 1 and where.step != self.head_dim)):
            return None
        for part in self.projections:
            if before <= start and stop <= before + part.stop:
                return LinearSlice(part.parent, part.name, start - before, stop - before)
            before += part.stop
        return None


def product_rows(module: Any) -> int:
    """Return how many values a product gives for a row."""
    if isinstance(module, Conv1D):
        return int(module.nf)
    packed = getattr(module, "packed", None)
    return int(packed.shape[0]) if packed is not None else int(module.weight.shape[0])


def described_blocks(
    model: PreTrainedModel, known: Forms | None = None
) -> tuple[list[DecoderBlock], tuple[str, ...], str]:
    """Return the layers that are understood, sentences on those that are not, and why there is none at all.

    known: forms of the layers of a copy, which are taken over where a layer is made of the same modules, and added to.
    """
    with torch.no_grad():
        found, odd, missing = forms_of(model, {} if known is None else known)
    blocks = [DecoderBlock(path, model.get_submodule(path), form) for path, form in found.items()]
    return sorted(blocks, key=lambda block: block.index), odd, missing
