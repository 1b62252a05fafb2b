"""Calls with which attention kernels are tested and timed: random states, one call for each kind of mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_accel.attention.kernel import AttentionKernel
from hf_accel.attention.question import Question, Visible, question_of
from hf_accel.core.calls.bands import Band
from hf_accel.ops.tiled import tiled_attention

TOKENS = 150  # more than a tile of any kernel
WINDOW = 37
SOFTCAP = 2.5


class Shape(NamedTuple):
    """What a kernel is tested with: head sizes of keys and values, and query heads per key/value head."""

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int]
    ratio: int


@dataclass(frozen=True, eq=False)
class Case:
    """One call: states [B, heads, T or S, D], what is seen of them, and the columns before which there is padding."""

    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: Visible
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def question(self) -> Question:
        return question_of(self.query, self.key, self.value, self.visible, self.softcap, self.sinks)

    def expected(self) -> torch.Tensor:
        """Return the attention [B, T, H, Dv] of the reference, in float64, on CUDA there, else on the CPU."""
        band, mask = self.visible.band, self.visible.mask
        output, _ = tiled_attention(
            *(_exact(x) for x in (self.query, self.key, self.value)),
            is_causal=self.visible.is_causal, window=self.visible.window,
            starts=None if band is None else band.starts_tensor,
            mask=None if mask is None else _exact(mask), softcap=self.softcap,
            sinks=None if self.sinks is None else _exact(self.sinks),
        )  # fmt: skip
        return output.transpose(1, 2).cpu()

    def found(self, kernel: AttentionKernel) -> torch.Tensor:
        """Return the attention [B, T, H, Dv] of a kernel."""
        scale = self.query.shape[3] ** -0.5
        return kernel.attend(self.query, self.key, self.value, self.visible, scale, self.softcap, self.sinks)


def _exact(states: torch.Tensor) -> torch.Tensor:
    states = states if states.is_cuda else states.cpu()
    return states if states.dtype is torch.bool else states.double()


def cases(shape: Shape, tokens: int = TOKENS) -> Iterator[Case]:
    """Yield one call for each kind of mask, of two groups of heads and two rows."""
    for name, options in {
        "full": {}, "causal": {}, "past": {"past": 75}, "padded": {"starts": (0, tokens // 2)},
        "padded past": {"past": 40, "starts": (60, 7)}, "window": {"window": WINDOW},
        "padded window": {"window": WINDOW, "starts": (tokens - 9, 0)}, "soft cap": {"softcap": SOFTCAP},
        "sinks": {"sinks": True}, "boolean": {"mask": torch.bool}, "additive": {"mask": shape.dtype},
        "per head": {"mask": torch.bool, "is_per_head": True},
    }.items():  # fmt: skip
        yield case(name, shape, tokens, **options)  # type: ignore[arg-type]


def case(
    name: str,
    shape: Shape,
    tokens: int,
    *,
    past: int = 0,
    starts: tuple[int, ...] = (0, 0),
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    mask: torch.dtype | None = None,
    is_per_head: bool = False,
    groups: int = 2,
) -> Case:
    """Return a call with random states whose last query belongs to the last column."""
    generator, batch, heads = torch.Generator().manual_seed(tokens), len(starts), groups * shape.ratio
    positions = tokens + past

    def states(count: int, length: int, size: int) -> torch.Tensor:
        made = torch.randn(batch, length, count, size, generator=generator).to(shape.device, shape.dtype)
        return made.transpose(1, 2)  # as models have them

    query, key, value = (
        states(heads, tokens, shape.sizes[0]),
        states(groups, positions, shape.sizes[0]),
        states(groups, positions, shape.sizes[1]),
    )
    if name == "full":
        visible = Visible()
    elif mask is not None:
        shown = torch.rand(batch, heads if is_per_head else 1, tokens, positions, generator=generator) > 0.4
        shown[..., 0] = True
        given = shown if mask is torch.bool else torch.where(shown, 0.0, -4.0)
        visible = Visible(mask=given.to(shape.device, mask))
    else:
        band = Band(tokens, positions, starts, window, shape.device)
        visible = Visible(True, band if band.has_effect else None)
    drawn = torch.randn(heads, generator=generator).to(shape.device) if sinks else None
    return Case(name, query, key, value, visible, softcap, drawn)
