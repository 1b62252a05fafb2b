"""Keys and values as a cache holds them, handed through a model to the attention that can read them so.

`Cache.update` returns tensors; a layer that keeps codes, or keeps some blocks elsewhere, returns `CachedStates`: they
have the shape, dtype and device of the tensors they stand for, and become these (all of the layer, for as long as
attention takes) in any operation that does not know better. Attention of this package takes `held` and reads it as it
lies. Cost: about 10 µs for the two handles of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from hf_accel.core.calls.cache_layers import StaticLayer
from hf_accel.errors import UnsupportedModelError
from hf_accel.ops import cached

Part = tuple[torch.Tensor, torch.Tensor]


class Member(NamedTuple):
    """What attention of one call among several reads: rows of the queries, its own keys, values and mask."""

    rows: slice
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Held:
    """Keys and values of one layer, [B, G, S, Dk] and [B, G, S, Dv], in parts along S that come one after the other.

    parts: yields keys and values [B, G, n, ...]: of the dtype, or rows of codes where `bits` is not None; a part may be
        overwritten when the next is asked for.
    visible: bool [B, G, S]: what of it is there at all, where positions were given up; then columns are not positions,
        and no mask made for positions fits. New tokens are the last T columns.
    observe: is told the queries [B, H, T, D] and the scale of the scores, and afterwards may give positions up.
    static: the layer whose fixed buffers these are, in a step of which only the device knows the lengths; S is then the
        capacity of the buffers, and what is visible follows from the layer's `lengths` and `starts`.
    members: where rows are those of several calls, what each holds; then there are no parts, and S is the most.
    """

    shape: tuple[int, int, int]
    sizes: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    bits: int | None
    parts: Callable[[], Iterator[Part]]
    visible: torch.Tensor | None = None
    observe: Callable[[torch.Tensor, float], None] | None = None
    static: StaticLayer | None = None
    members: tuple[Member, ...] | None = None
    _dense: Part | None = field(default=None, repr=False)

    def decoded(self, part: Part) -> Part:
        """Return keys and values of a part as tensors of the dtype."""
        if self.bits is None:
            return part
        keys, values = part
        return (
            cached.decode(keys, self.bits, self.sizes[0], self.dtypes[0], is_key=True),
            cached.decode(values, self.bits, self.sizes[1], self.dtypes[1], is_key=False),
        )

    def dense(self) -> Part:
        """Return keys [B, G, S, Dk] and values [B, G, S, Dv] of the layer as tensors.

        Raises:
            UnsupportedModelError: positions were given up, so that the asker's masks do not fit them; or the rows are
                those of several calls.
        """
        if self.members is not None:
            raise UnsupportedModelError("Keys and values of several calls are no tensor.")
        if self.visible is not None:
            raise UnsupportedModelError(
                "This model's attention reads keys and values itself, but the cache has given positions up and only "
                "attention of hf_accel knows which. Use eviction with models whose attention is 'sdpa'."
            )
        if self._dense is None:
            keys = torch.empty((*self.shape, self.sizes[0]), dtype=self.dtypes[0], device=self.device)
            values = torch.empty((*self.shape, self.sizes[1]), dtype=self.dtypes[1], device=self.device)
            at = 0
            for part in self.parts():
                k, v = self.decoded(part)
                keys.narrow(2, at, k.shape[2]).copy_(k)
                values.narrow(2, at, v.shape[2]).copy_(v)
                at += k.shape[2]
            self._dense = keys, values
        return self._dense

    def states(self) -> tuple[CachedStates, CachedStates]:
        """Return the handles of keys and values."""
        return CachedStates(self, 0), CachedStates(self, 1)


class CachedStates(torch.Tensor):
    """Stands for the keys (`part` 0) or values (1) that `held` describes."""

    held: Held
    part: int

    @staticmethod
    def __new__(cls, held: Held, part: int) -> CachedStates:
        made: CachedStates = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (*held.shape, held.sizes[part]), dtype=held.dtypes[part], device=held.device
        )
        made.held, made.part = held, part
        return made

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CachedStates({'values' if self.part else 'keys'}, {[*self.shape]}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dense(value: Any) -> Any:
            return value.held.dense()[value.part] if isinstance(value, CachedStates) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))
