"""A decoder layer as data: what it is made of, by paths within it, and what is done in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_accel.core.model.discovery.norms import NormForm
from hf_accel.kernels.native import Heads

# see hf_accel.kernels.native.BlockShape
Extent = Literal["head", "heads", "row"]
Rotary = Literal["halves", "pairs", "pairs_of_halves", "none"]
# arguments that a layer hands on, or of which it has no use once it is given its mask and angles
CARRIED = frozenset({"position_embeddings", "position_ids", "cache_position", "use_cache", "logits_to_keep"})


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the product at `path`."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class AngleForm:
    """How the angles [.., T, R] of a layer's arguments become those of a head's columns.

    axes: where they come by axis, [A, B, T, R], the axis of each column. is_doubled: there is one for two columns.
    is_swapped: the sine comes first. is_backwards: heads are turned by the negative angle.
    """

    axes: tuple[int, ...] | None = None
    is_doubled: bool = False
    is_swapped: bool = False
    is_backwards: bool = False

    @property
    def is_plain(self) -> bool:
        return self == AngleForm()

    def of(self, given: Any) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, T, columns] of what a layer is given."""
        cos, sin = given[::-1] if self.is_swapped else given
        if self.is_backwards:
            sin = -sin
        if self.axes is not None:
            cos, sin = (torch.stack([t[axis, ..., i] for i, axis in enumerate(self.axes)], -1) for t in (cos, sin))
        return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if self.is_doubled else (cos, sin)


@dataclass(frozen=True)
class CallForm:
    """How a layer is called and answers.

    hidden, cache, mask: names of arguments. fixed: what other arguments were, which must be so again. length: of the
    tuple that it returns, whose further entries are None; 0: it returns a tensor.
    """

    hidden: str
    cache: str
    mask: str
    fixed: tuple[tuple[str, Any], ...]
    length: int

    def fits(self, arguments: dict[str, Any]) -> bool:
        """Return whether a call asks for what was recorded, but for the values of its tensors."""
        for name, value in arguments.items():
            if value is None or name in CARRIED or name == self.cache or name == self.mask:
                continue
            if isinstance(value, Tensor) or (value is not False and (name, value) not in self.fixed):
                return False
        return True


@dataclass(frozen=True, kw_only=True)
class BlockForm:
    """One decoder layer. Names as in `hf_accel.kernels.native.BlockShape` and `BlockWeights`.

    feed_forward: the path of the module that follows attention where it is no plain feed-forward part; up and down are
    None then. sinks: the name of a tensor of the attention module.
    """

    attention: str
    index: int
    call: CallForm
    projections: tuple[str, ...]
    o: str
    gate: Rows | None
    up: Rows | None
    down: str | None
    feed_forward: str | None
    norms: dict[str, NormForm]
    heads: int
    kv_heads: int
    head_dim: int
    q: Heads
    k: Heads
    v: Heads
    output_gate: Heads | None
    norm_extent: Extent
    norms_after_rotary: bool
    rotary: Rotary
    rotary_size: int
    rotates_once: bool
    angles: AngleForm
    activation: str
    scale: float
    softcap: float | None
    sinks: str | None
    residual_scale: float
    out_scale: float
    is_parallel: bool

    def __str__(self) -> str:
        """Say in a few words what the layer is made of."""
        kinds = dict.fromkeys(form.kind for form in self.norms.values())
        order = "parallel" if self.is_parallel else "sequential"
        turned = "no rotary" if self.rotary == "none" else f"rotary {self.rotary} of {self.rotary_size}"
        part = "a module of its own" if self.up is None else f"{'gated ' if self.gate else ''}{self.activation}"
        heads = f"{self.heads} heads over {self.kv_heads}"
        return f"{order}, norms {' and '.join(kinds)} ({', '.join(self.norms)}), {heads}, {turned}, feed-forward {part}"
