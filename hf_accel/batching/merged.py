"""Rows of several caches as one: a layer that stands for the layers of several calls, side by side.

Nothing is copied and nothing moves: every call keeps its own cache, of whatever kind, which takes in its own rows of
new keys and values and gives its own attention what it reads. What is merged are the products. Cost per layer: some
microseconds of Python per call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from hf_accel.core.calls.cache_layers import Reserved
from hf_accel.core.calls.held import CachedStates, Held, Member


@dataclass(eq=False)
class Part:
    """The rows of one call.

    starts: of each row the first column that is no padding; None: no row is padded. understood: inputs of a pass that
    may be there, see `hf_accel.core.calls.forward.understood_inputs`.
    """

    cache: Any
    rows: int
    starts: list[int] | None
    understood: frozenset[str] = frozenset()

    def mask(self, positions: int, length: int) -> torch.Tensor | None:
        """Return what one token of each row sees of the last `positions` of `length` columns, bool [B, 1, 1, S]."""
        if self.starts is None or max(self.starts) <= length - positions:
            return None
        columns = torch.arange(length - positions, length)
        return (columns >= torch.tensor(self.starts)[:, None])[:, None, None]


class MergedLayer(CacheLayerMixin):
    """Layer `index` of the caches of `parts`, whose rows come one after the other; for steps of one token."""

    is_compileable = False

    def __init__(self, parts: list[Part], index: int) -> None:
        super().__init__()
        self._parts = [(part, part.cache.layers[index]) for part in parts]
        self.is_sliding = bool(getattr(self._parts[0][1], "is_sliding", False))
        self.is_initialized = True

    @property
    def members(self) -> list[Any]:
        """See `hf_accel.core.calls.cache_layers.JoinedLayer`."""
        return [layer for _, layer in self._parts]

    @property
    def bits(self) -> int | None:
        found: int | None = getattr(self._parts[0][1], "bits", None)
        return found

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: each call's layer does so when it is given states."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give each call's layer its rows of keys and values [R, G, 1, D]; return handles of what attention reads."""
        members, at, most = [], 0, 0
        for part, layer in self._parts:
            rows = slice(at, at + part.rows)
            keys, values = layer.update(key_states[rows], value_states[rows], *args, **kwargs)
            window = layer.sliding_window if self.is_sliding else keys.shape[2]
            if keys.shape[2] > window:  # a layer that keeps more leaves it to masks, and none are made here
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            mask = part.mask(keys.shape[2], layer.get_seq_length())
            members.append(Member(rows, keys, values, None if mask is None else mask.to(key_states.device)))
            at, most = at + part.rows, max(most, keys.shape[2])
        sizes = key_states.shape[3], value_states.shape[3]
        dtypes = key_states.dtype, value_states.dtype
        shape = at, key_states.shape[1], most
        held = Held(shape, sizes, dtypes, key_states.device, None, lambda: iter(()), members=tuple(members))
        return CachedStates(held, 0), CachedStates(held, 1)

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Reserved | None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`; None where a call's layer or its format differs.

        And where rows are padded in a layer that does not say at which position its buffers begin.
        """
        places: list[tuple[int, ...]] = []
        head: Reserved | None = None
        for part, layer in self._parts:
            reserve = getattr(layer, "reserve", None)
            is_placed = part.starts is None or hasattr(layer, "columns")
            if reserve is None or layer.bits != self.bits or not is_placed:
                return None
            found: Reserved | None = reserve(part.rows, tokens, kv_heads, head_dim, dtype, device)
            if found is None or found.row_pasts is not None:
                return None
            head = head or found
            places += _places(part, layer, found)
        rows = torch.tensor(places)
        past, first = int(rows[:, 6].max()), int(rows[:, 7].min())
        return None if head is None else Reserved(head.keys, head.values, past, first, None, rows)

    def commit(self, tokens: int) -> None:
        """See `hf_accel.core.calls.cache_layers.AppendableLayer`."""
        for _, layer in self._parts:
            layer.commit(tokens)

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for _, layer in self._parts)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as it is called in transformers up to 5.23


def _places(part: Part, layer: Any, reserved: Reserved) -> list[tuple[int, ...]]:
    """Return where each row of a call lies, as `Reserved.rows` has it."""
    keys, values, past, first = reserved[:4]
    at, step = keys.data_ptr(), keys.stride(0) * keys.element_size()
    values_at, values_step = values.data_ptr(), values.stride(0) * values.element_size()
    strides = keys.stride(1), keys.stride(2), values.stride(1), values.stride(2), past
    if part.starts is None:
        return [(at + row * step, values_at + row * values_step, *strides, first) for row in range(part.rows)]
    seen = layer.columns(1)[0]  # the position that `first` stands for
    firsts = [first + max(0, start - seen) for start in part.starts]
    return [(at + row * step, values_at + row * values_step, *strides, begin) for row, begin in enumerate(firsts)]


def merged(parts: list[Part]) -> Cache:
    """Return a cache that stands for those of the parts."""
    return Cache(layers=[MergedLayer(parts, index) for index in range(len(parts[0].cache.layers))])
