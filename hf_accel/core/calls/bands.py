"""Masks that are said in a few numbers: causal, left-padded, of a sliding window, and not made until somebody asks.

A mask [B, 1, T, S] of a prompt is quadratic, while nearly all of them are bands: query t of row b sees the columns from
max(starts[b], end - window + 1) to its end, S - T + t. `BandMask` is the tensor that stock would hand on, in shape,
dtype and device, and becomes it in any operation that does not know better; attention of this package takes `band`, and
what is found out about it once (where rows start, how they lie one after the other) serves all layers of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_map


@dataclass(eq=False)
class Band:
    """What the queries of B rows see: T tokens, the last of S columns.

    starts: the first column of each row that is no padding. window: the most columns that a query sees; None: all
    before it. kept: what attention made of it for all layers of a pass, by whom.
    """

    tokens: int
    positions: int
    starts: tuple[int, ...]
    window: int | None
    device: torch.device
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_padded(self) -> bool:
        return any(self.starts)

    @property
    def has_effect(self) -> bool:
        """Whether it hides more than a causal mask of as many columns as queries does."""
        return self.is_padded or self.tokens != self.positions or self.is_windowed

    @property
    def is_windowed(self) -> bool:
        return self.window is not None and self.window < self.positions

    @cached_property
    def starts_tensor(self) -> torch.Tensor:
        """The starts, int64 [B] on the CPU."""
        return torch.tensor(self.starts, dtype=torch.int64)

    @cached_property
    def dense(self) -> torch.Tensor:
        """The mask itself, bool [B, 1, T, S], true: visible."""
        columns = torch.arange(self.positions, device=self.device)
        ends = torch.arange(self.positions - self.tokens, self.positions, device=self.device)[:, None]
        visible = columns <= ends
        if self.window is not None:
            visible &= columns > ends - self.window
        if self.is_padded:
            return visible & (columns >= self.starts_tensor.to(self.device)[:, None, None, None])
        return visible.expand(len(self.starts), 1, -1, -1)

    def mask(self) -> BandMask:
        """Return the tensor that stands for the mask."""
        return BandMask(self)


class BandMask(torch.Tensor):
    """Stands for the mask that `band` describes."""

    band: Band

    @staticmethod
    def __new__(cls, band: Band) -> BandMask:
        made: BandMask = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (len(band.starts), 1, band.tokens, band.positions), dtype=torch.bool, device=band.device
        )
        made.band = band
        return made

    def data_ptr(self) -> int:
        """Return where the mask itself lies, which this makes."""
        return self.band.dense.data_ptr()

    def stride(self, *dim: Any) -> Any:
        """Return the strides of the mask itself, which this makes."""
        return self.band.dense.stride(*dim)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"BandMask({[*self.shape]}, starts={self.band.starts}, window={self.band.window})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dense(value: Any) -> Any:
            return value.band.dense if isinstance(value, BandMask) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def band_of(mask: Any) -> Band | None:
    """Return the band that a mask stands for, None where it is another mask, or none."""
    return mask.band if isinstance(mask, BandMask) else None


def starts_of(padding: torch.Tensor) -> tuple[int, ...] | None:
    """Return the first true column of each row of a 2-D mask [B, S]; None where padding is not on the left alone."""
    if padding.shape[1] > 1 and bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        return None
    return tuple(int(n) for n in (~padding).sum(-1).tolist())


def described(request: dict[str, Any]) -> Band | None:
    """Return the band that the keywords of transformers' mask functions ask for; None where it may be no band.

    Asked of the mask function itself: every query sees its own column and the first of its window, and neither the
    next one nor the one before its window. What transformers lays over that (packed texts, blocks of images, trees,
    functions of the user's) forbids to skip the mask, and is not described.
    """
    tokens, positions = request.get("q_length"), request.get("kv_length")
    first, past = request.get("kv_offset", 0), request.get("q_offset", 0)
    function, padding, window = (request.get(name) for name in ("mask_function", "attention_mask", "local_size"))
    if (
        not all(type(number) is int for number in (tokens, positions, first, past))
        or not request.get("allow_is_causal_skip", False)
        or request.get("use_vmap", True)
        or function is None
        or past + tokens != first + positions  # type: ignore[operator]
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return None
    batch, device = request["batch_size"], torch.device(request.get("device", "cpu"))
    starts: tuple[int, ...] | None = (0,) * batch
    if padding is not None:
        if padding.dtype is not torch.bool or padding.shape != (batch, first + positions):  # type: ignore[operator]
            return None
        starts = starts_of(padding[:, first:])
    if starts is None or not _is_band(function, batch, past, tokens, window, device):  # type: ignore
        return None
    return Band(tokens, positions, starts, window, device)  # type: ignore[arg-type]


def _is_band(
    function: Callable[..., torch.Tensor], batch: int, past: int, tokens: int, window: int | None, device: torch.device
) -> bool:
    rows = torch.arange(batch, device=device)[:, None]
    ends = torch.arange(past, past + tokens, device=device)[None]
    borders = [(0, True), (1, False), *([] if window is None else [(1 - window, True), (-window, False)])]
    for distance, expected in borders:
        columns = ends + distance
        if not bool(((function(rows, rows * 0, ends, columns) == expected) | (columns < 0)).all()):
            return False
    return window is not None or bool(function(rows, rows * 0, ends, ends * 0).all())
