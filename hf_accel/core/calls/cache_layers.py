"""What cache layers may offer beyond transformers' own contract."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Reserved(NamedTuple):
    """Buffers [B, G, C, D], with C >= past + T, into which a kernel writes T new keys and values of each row.

    past: the position where the first new token belongs; where rows have different lengths, that of the longest.
    first: the first position that the new tokens can see.
    row_pasts: where rows have different lengths, the `past` of each, int64 [B] on the CPU.
    rows: where each row lies in buffers [G, C, D] of its own, int64 [B, 8] on the CPU, contiguous: the addresses of its
        keys and values, their strides by G and by C, its past and its first, as `NativeBlock` takes them. Whoever
        reserves keeps the buffers alive. keys and values are then those of the first row, past the largest, first the
        smallest, and a mask of the pass stands for nothing: each row sees its own buffers from its first on.
    """

    keys: torch.Tensor
    values: torch.Tensor
    past: int
    first: int
    row_pasts: torch.Tensor | None
    rows: torch.Tensor | None = None


class AppendableLayer(Protocol):
    """A cache layer into whose buffers a kernel may write new keys and values itself.

    `reserve` returns where, or None if the layer cannot take them that way. After the kernel has written T positions of
    each row, `commit(T)` makes them part of the cache.
    bits: 8 or 4 where the buffers are rows of codes, uint8 [B, G, C, R], see `hf_accel.ops.cached`.
    """

    @property
    def bits(self) -> int | None: ...

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Reserved | None: ...

    def commit(self, tokens: int) -> None: ...


@runtime_checkable
class RaggedLayer(Protocol):
    """A cache layer whose rows can have different lengths, as they do when each accepts its own number of drafts.

    Positions count from a row's first column, padding included. After `set_rows` the next tokens of row b go to
    lengths[b], lengths[b] + 1, ...; what lay beyond is forgotten. `columns(T)` says which positions [first, stop) the
    keys cover that `update` returns for T new tokens. Attention needs an explicit mask then; layers of a sliding
    window must be recording their past.
    """

    def columns(self, tokens: int) -> tuple[int, int]: ...

    def set_rows(self, lengths: list[int]) -> None: ...


class LeavingLayer(Protocol):
    """A cache layer that rows can leave when their text has ended, see `hf_accel.core.calls.cache_rows`.

    `rows_stay(n)` says why they stay while n rows go on, None if they can leave. `keep_rows(slots)` lets row b be what
    row slots[b] was, where slots[b] >= b, and drops the others; with `gives_back` their memory as well, by a copy of
    all that remain. It returns the bytes that were freed.
    """

    def rows_stay(self, rows: int) -> str | None: ...

    def keep_rows(self, slots: list[int], *, gives_back: bool) -> int: ...


class StaticLayer(Protocol):
    """A cache layer of fixed buffers, of whose lengths only the device knows: a step over it can be captured.

    keys, values: [B, G, C, D] of the model's dtype, or uint8 rows of codes [B, G, C, R] (see `hf_accel.ops.cached`)
        where `bits` is 8 or 4. Their addresses never change, nor do those of `lengths` and `starts`.
    sizes: head sizes of keys and values. dtypes: theirs as attention reads them.
    sliding_window: how many positions a query sees, itself included; None: all. The buffers have all C columns anyway.
    lengths: int32 [B] on the device, columns of each row that were filled before this step: its first new token goes to
        column lengths[b]. Shared by all layers of a cache; who runs the step advances it after the last layer.
    starts: int32 [B] on the device, the first column of each row that is no padding. Shared, too.
    """

    keys: Any
    values: Any
    lengths: torch.Tensor
    starts: torch.Tensor
    sizes: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def bits(self) -> int | None: ...

    @property
    def sliding_window(self) -> int | None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states [B, G, T, D] at columns lengths[b].. of each row, by operations of the device alone.

        Returns what attention reads: `CachedStates` whose `held.static` is this layer.
        """
        ...


class JoinedLayer(Protocol):
    """A cache layer that stands for those of several calls, whose rows come one after the other in a pass.

    members: the layer of each call. Whoever makes the pass without `update` sees to it that each of them grows.
    """

    @property
    def members(self) -> list[Any]: ...


def takes_states(layer: Any) -> bool:
    """Return whether keys and values may be given to a cache layer after the pass that made them.

    Layers of transformers keep what they are given as it is, and say nothing; ours say so by `takes_states`.
    """
    own = getattr(layer, "takes_states", None)
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) if own is None else bool(own)


def rows_apart_obstacle(layer: Any) -> str | None:
    """Return why the rows of a cache layer cannot have different lengths, None if they can."""
    return None if isinstance(layer, RaggedLayer) else f"rows of a {type(layer).__name__} cannot have different lengths"
