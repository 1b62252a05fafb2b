"""Cache layers as a step sees them that can be captured: fixed buffers, and only the device knows how full they are."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_accel.core.calls.held import CachedStates, Held
from hf_accel.ops import cached
from hf_accel.ops.static_attention import visible_columns


class AskedForLength(RuntimeError):
    """Code of the model asked how many tokens there are, which a step that is captured must not depend on."""


class Fill:
    """How far the buffers of a cache are filled, on the device: shared by its layers.

    lengths, starts: int32 [B], see `hf_accel.core.calls.cache_layers.StaticLayer`.
    columns: int64 [B, T], where the tokens of the step in progress belong.
    """

    def __init__(self, rows: int, bits: int | None, device: torch.device) -> None:
        self.bits = bits
        with torch.inference_mode(False):  # what is made in that mode could not be written outside of it
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
            self.starts = torch.zeros(rows, dtype=torch.int32, device=device)
            self._rows = torch.arange(rows, device=device)[:, None, None]
            self.columns = torch.zeros((rows, 1), dtype=torch.int64, device=device)

    def of(self, rows: slice) -> Fill:
        """Return what is so of some rows: the same memory."""
        found = copy.copy(self)
        found.lengths, found.starts = self.lengths[rows], self.starts[rows]
        found.columns = self.columns[rows]
        found._rows = self._rows[: len(found.lengths)]
        return found

    def begin(self, ahead: torch.Tensor) -> None:
        """Begin a step of T tokens; ahead: int64 [T], 0 to T - 1."""
        self.columns = self.lengths[:, None] + ahead

    def write(self, buffer: torch.Tensor, states: torch.Tensor, *, is_key: bool) -> None:
        """Write states [B, G, T, D] at the columns of the step's tokens."""
        kept = states.to(buffer.dtype) if self.bits is None else cached.encode(states, self.bits, is_key=is_key)
        if len(self.columns) == 1:
            buffer.index_copy_(2, self.columns[0], kept)
        else:
            heads = torch.arange(buffer.shape[1], device=buffer.device)[None, :, None]
            buffer.index_put_((self._rows, heads, self.columns[:, None]), kept)


class StepLayer(CacheLayerMixin):
    """See `hf_accel.core.calls.cache_layers.StaticLayer`.

    gives_handles: whether `update` returns `CachedStates`, for attention that reads them; else the buffers, for
        attention that goes by the masks of the step.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        fill: Fill,
        keys: torch.Tensor,
        values: torch.Tensor,
        sizes: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        window: int | None,
    ) -> None:
        self.fill, self.lengths, self.starts = fill, fill.lengths, fill.starts
        self.keys: Any = keys
        self.values: Any = values
        self.sizes, self.dtypes = sizes, dtypes
        self.sliding_window, self.is_sliding = window, window is not None
        self.gives_handles = True
        self.is_initialized = True

    def of(self, fill: Fill, rows: slice) -> StepLayer:
        """Return some rows of this layer, of which `fill` tells how far they are filled: the same memory."""
        return StepLayer(fill, self.keys[rows], self.values[rows], self.sizes, self.dtypes, self.sliding_window)

    @property
    def bits(self) -> int | None:
        return self.fill.bits

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `hf_accel.core.calls.cache_layers.StaticLayer`."""
        keys, values = self.keys, self.values
        self.fill.write(keys, key_states, is_key=True)
        self.fill.write(values, value_states, is_key=False)
        if not self.gives_handles and self.bits is None:
            return keys, values
        shape = keys.shape[0], keys.shape[1], keys.shape[2]
        parts = [(keys, values)]
        held = Held(shape, self.sizes, self.dtypes, keys.device, self.bits, lambda: iter(parts), static=self)
        return CachedStates(held, 0), CachedStates(held, 1)

    def visible(self, tokens: int) -> torch.Tensor:
        """Return bool [B, 1, T, C]: the columns that the tokens of a step see."""
        return visible_columns(self.lengths, self.starts, tokens, self.keys.shape[2], self.sliding_window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    def get_seq_length(self) -> NoReturn:
        raise AskedForLength("its code asks the cache for its length")

    def get_mask_sizes(self, query_length: int) -> NoReturn:
        raise AskedForLength("its code makes masks of its own")
