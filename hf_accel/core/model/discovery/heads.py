"""Where the heads of queries, keys and values lie in what the projections give, and what is done to them on the way.

What attention was called with is found again, head by head, in the projections' rows: as it is, normed, turned, or
both. Positions, norms and layouts that do not explain every head of every token explain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.discovery.forms import AngleForm, Extent, Rotary
from hf_accel.core.model.discovery.norms import NormForm, normed
from hf_accel.core.model.discovery.readings import Unexplained, agreement, the_best
from hf_accel.kernels.native import Heads

_CANCELLED = 1e-12  # of the squares of two vectors, what of the square of their difference may be rounding
ROTARIES: tuple[Rotary, ...] = ("none", "halves", "pairs", "pairs_of_halves")  # see hf_accel.kernels.native.BlockShape


@dataclass(frozen=True)
class Angles:
    """cos and sin [B or 1, T, R] of the positions, made of what a layer is given as the form says."""

    form: AngleForm
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Projected:
    """What the projections gave: rows [B * T, N] in order, and where each product's part of a row begins and ends."""

    rows: Tensor
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CalledNorm:
    """A norm within attention, and what it was given."""

    form: NormForm
    module: Any
    given: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return normed(self.form.kind, self.form.eps, x, *self.tensors())

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Return its weight and bias."""
        names = (self.form.weight, self.form.bias)
        weight, bias = (None if name is None else getattr(self.module, name).detach().double() for name in names)
        return weight, bias

    def read(self, heads: Tensor, dtype: torch.dtype, *, is_exact: bool) -> bool:
        """Return whether it was given these heads, in whatever order: norms of equal weights are told apart by this.

        is_exact: to the last bit, as products gave them.
        """
        given = self.given.double()
        if given.numel() != heads.numel():
            return False
        ours, theirs = heads.flatten().sort().values, given.flatten().sort().values
        return bool((ours - theirs).norm() <= (0.0 if is_exact else agreement(dtype)) * theirs.norm())


@dataclass(frozen=True)
class HeadsForm:
    """Where heads lie, and how they are normed, turned by which angles, and multiplied. places: of each head in a row.

    norm_extent: see `hf_accel.kernels.native.BlockShape`.
    """

    heads: Heads
    norm: NormForm | None
    norm_extent: Extent
    is_normed_after: bool
    rotary: Rotary
    angles: AngleForm
    rotary_size: int
    factor: float
    places: tuple[int, ...]


def rotated(style: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., D] turned in its first R columns by the angles [..., R]."""
    size = cos.shape[-1]
    x, rest = x[..., :size], x[..., size:]
    half = size // 2
    if style == "halves":
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        if style == "pairs_of_halves":
            cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
        else:
            cos, sin = (t[..., ::2].repeat_interleave(2, -1) for t in (cos, sin))
    return torch.cat([x * cos + turned * sin, rest], -1)


def find_heads(
    what: str,
    wanted: Tensor,
    projected: Projected,
    norms: Sequence[CalledNorm],
    angles: Sequence[Angles],
    group: int,
    dtype: torch.dtype,
    factors: Sequence[float] = (1.0,),
) -> HeadsForm:
    """Return where the heads of `wanted` [B, H, T, D] lie.

    group: how many of them share a key/value head. angles: those that are tried. factors: that they may have.

    Raises: Unexplained.
    """
    batch, heads, tokens, d = wanted.shape
    target = wanted.transpose(1, 2).reshape(batch * tokens, heads, d).double()  # [BT, H, D]
    found: list[tuple[float, HeadsForm]] = []
    turns: list[tuple[Rotary, Angles | None]] = [("none", None)]
    turns += [(style, one) for one in angles for style in ROTARIES[1:]]
    for norm in [None, *norms]:
        for extent, (before, after) in _normed_rows(projected, norm, d):
            for rotary, one in turns:
                can_follow = extent == "head" and norm is not None and one is not None
                for is_last in (False, True) if can_follow else (False,):
                    given = _turned(rotary, before, one, batch) if is_last else before
                    made = norm(given) if is_last and norm is not None else _turned(rotary, after, one, batch)
                    for factor in factors:
                        error, places = _places(made * factor, target, dtype)
                        if not places or not _is_read(norm, given[:, places], before[:, places], dtype, is_last):
                            continue
                        form, size = (AngleForm(), 0) if one is None else (one.form, one.cos.shape[-1])
                        where = heads_at(places, d, group)
                        used = None if norm is None else norm.form
                        starts = tuple(place * d for place in places)
                        found.append(
                            (error, HeadsForm(where, used, extent, is_last, rotary, form, size, factor, starts))
                        )
    return the_best(found, what)


def _is_read(norm: CalledNorm | None, given: Tensor, before: Tensor, dtype: torch.dtype, is_last: bool) -> bool:
    """Return whether a norm was given these heads: as the products gave them, `before`, or turned."""
    if norm is None or not is_last:
        return norm is None or norm.read(given, dtype, is_exact=True)
    return norm.read(given, dtype, is_exact=False) and not norm.read(before, dtype, is_exact=True)


def _turned(rotary: str, slots: Tensor, angles: Angles | None, batch: int) -> Tensor:
    if angles is None:
        return slots
    rows = slots.shape[0]
    cos, sin = (t.expand(batch, *t.shape[1:]).reshape(rows, 1, -1) for t in (angles.cos, angles.sin))
    return rotated(rotary, slots, cos, sin)


def _normed_rows(
    projected: Projected, norm: CalledNorm | None, d: int
) -> Iterator[tuple[Extent, tuple[Tensor, Tensor]]]:
    """Yield how a norm may lie over the heads, and the rows as slots [BT, N / D, D], before it and after it."""
    rows = projected.rows
    slots = rows.view(rows.shape[0], -1, d)
    if norm is None:
        yield "head", (slots, slots)
        return
    size, shape = norm.form.size, norm.form.shape
    if size in (0, d):
        yield "head", (slots, norm(slots))
        if size:
            return
    for start, stop in projected.parts:
        if size not in (0, stop - start):
            continue
        part = rows[:, start:stop]
        extent: Extent = "heads" if shape and len(shape) == 2 else "row"
        done = norm(part.view(rows.shape[0], -1, d)).flatten(1) if extent == "heads" else norm(part)
        whole = torch.full_like(rows, torch.nan)
        whole[:, start:stop] = done
        yield extent, (slots, whole.view(rows.shape[0], -1, d))


def _places(slots: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[float, list[int]]:
    """Return the slot that each head of target [BT, H, D] is in, after the worst relative error of one.

    No slots where a head is in none, or in two.
    """
    places, worst = [], 0.0
    rows, heads = (t.transpose(0, 1).flatten(1) for t in (slots, target))
    size = heads.square().sum(1, keepdim=True)
    # by products, many times as fast as differences, of which they leave some digits: enough to find slots to look at
    lengths = size + rows.square().sum(1)
    may_be = lengths - 2 * heads @ rows.T <= (2 * agreement(dtype)) ** 2 * size + _CANCELLED * lengths
    if not may_be.any(1).all():
        return worst, []
    for head, norm, some in zip(heads, size.sqrt(), may_be, strict=True):
        candidates = some.nonzero()[:, 0]
        errors = (rows[candidates] - head).norm(dim=1) / norm
        near = (errors <= agreement(dtype)).nonzero()
        if len(near) != 1:
            return worst, []
        places.append(int(candidates[int(near)]))
        worst = max(worst, float(errors[int(near)]))
    return worst, places


def heads_at(places: list[int], d: int, group: int) -> Heads:
    """Return the start, stride and step of heads in these slots of `d` values, `group` to a key/value head.

    Raises: Unexplained where they lie in no such order.
    """
    step = places[1] - places[0] if group > 1 else 1
    stride = places[group] - places[0] if len(places) > group else group * step
    expected = [places[0] + h // group * stride + h % group * step for h in range(len(places))]
    if places != expected:
        raise Unexplained("its heads lie in no regular order")
    return Heads(places[0] * d, stride * d, step * d)


def find_gate(output: Tensor, given: Tensor, projected: Projected, group: int, dtype: torch.dtype) -> Heads | None:
    """Return where the gate of the attention's output [B, T, H, D] lies; None where `given` [B, T, H D] is as it is.

    Raises: Unexplained.
    """
    batch, tokens, heads, d = output.shape
    out = output.reshape(batch * tokens, heads, d).double()
    want = given.reshape(batch * tokens, heads, d).double()
    if (out - want).norm() <= agreement(dtype) * want.norm():
        return None
    gates = torch.sigmoid(projected.rows.view(batch * tokens, -1, d))
    places = []
    for head in range(heads):
        off = (gates * out[:, head, None] - want[:, head, None]).square().sum((0, 2)).sqrt()
        near = (off <= agreement(dtype) * want[:, head].norm()).nonzero()
        if len(near) != 1:
            raise Unexplained("something comes between attention and its output product")
        places.append(int(near))
    return heads_at(places, d, group)
