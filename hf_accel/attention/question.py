"""What one call asks of attention: the question by which a kernel is chosen, and what its queries may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hf_accel.core.calls.bands import Band

MaskKind = Literal["full", "causal", "padded", "boolean", "additive"]


@dataclass(frozen=True, slots=True)
class Question:
    """What attention is asked for. Equal questions have the same answer, so lengths are powers of two.

    sizes: head sizes of keys and values. heads, groups: H and G. tokens, positions: T and S, rounded up.
    is_square: T is S. mask: "full", everything is seen; "causal"; "padded", causal with padding on the left; or a mask
    "boolean" or "additive", `is_per_head` or one for all heads. window: None, or columns that a causal query sees.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int]
    heads: int
    groups: int
    tokens: int
    positions: int
    is_square: bool
    mask: MaskKind
    window: int | None = None
    is_per_head: bool = False
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def kind(self) -> str:
        """The mask in words, for people."""
        words = [self.mask, "per head"] if self.is_per_head else [str(self.mask)]
        words += [] if self.window is None else [f"window {self.window}"]
        words += [] if self.softcap is None else ["soft cap"]
        words += ["sinks"] if self.has_sinks else []
        words += [] if self.is_square else ["past"]
        return ", ".join(words)


@dataclass(frozen=True, slots=True, eq=False)
class Visible:
    """Which columns the queries of a call see.

    band: causal, with or without padding and a window. mask: [1 or B, 1 or H, T, S], bool (true: visible) or a summand,
    on its own. Neither: everything, or with `is_causal` what lies before; T is S then.
    """

    is_causal: bool = False
    band: Band | None = None
    mask: torch.Tensor | None = None

    @property
    def starts(self) -> tuple[int, ...] | None:
        """The first visible column of each row; None where there is no padding."""
        return self.band.starts if self.band is not None and self.band.is_padded else None

    @property
    def window(self) -> int | None:
        """The most columns that a query sees; None where it hides nothing."""
        return self.band.window if self.band is not None and self.band.is_windowed else None

    @property
    def kind(self) -> MaskKind:
        if self.mask is not None:
            return "boolean" if self.mask.dtype is torch.bool else "additive"
        return "padded" if self.starts else "causal" if self.is_causal else "full"


def question_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Visible,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Question:
    """Return the question that a call asks: query [B, H, T, D], key [B, G, S, D], value [B, G, S, Dv]."""
    _, heads, tokens, size = query.shape
    groups, positions = key.shape[1], key.shape[2]
    return Question(
        query.device,
        query.dtype,
        (size, value.shape[3]),
        heads,
        groups,
        1 << (tokens - 1).bit_length(),
        1 << (positions - 1).bit_length(),
        tokens == positions,
        visible.kind,
        visible.window,
        visible.mask is not None and visible.mask.shape[1] > 1,
        softcap,
        sinks is not None,
    )
