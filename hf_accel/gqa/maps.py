"""Which maps of keys leave scores alone: what a head's keys may be turned by, if its queries are turned back.

Scores are products of queries and keys. A map of the keys leaves them alone where the queries take its inverse, unless
something stands between projection and product. A rotary embedding lets through what commutes with its rotations: each
pair of numbers that it turns is one complex number, which may be multiplied by another. A norm over the head lets
through turns and exchanges of sign, and where its weights differ exchanges of sign alone. What holds for a module is
found out by running it: architectures need not be known.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import UnsupportedModelError
from hf_accel.gqa.heads import Heads
from hf_accel.gqa.running import RecordedCall, Runnable

TOLERANCE = 1e-4  # of an output's norm, in fp32; a map that does not belong there changes it by tenths


class Freedom(enum.Enum):
    """What a pair of numbers, or a number without position, may be multiplied by."""

    ANY = "any number"
    TURNS = "a number of modulus one"
    SIGNS = "one or minus one"
    NONE = "nothing"


@dataclass(frozen=True)
class KeyMaps:
    """pairs [P, 2]: the numbers of a head that its rotary embedding turns together. free [F]: those without position.

    With freedom ANY the free numbers may be mixed by any invertible matrix [F, F]; with less, each stands alone.
    """

    pairs: Tensor
    free: Tensor
    freedom: Freedom


def found_maps(runnable: Runnable, call: RecordedCall, heads: Heads, config: Any) -> KeyMaps:
    """Return the freest maps of keys that leave the outputs of an attention module alone.

    Raises:
        UnsupportedModelError: not even the same projections written back give the same outputs, or something stands
            between values and the output projection.
    """
    expected = runnable.outputs(call, heads)

    def leaves_alone(mapped: Heads) -> bool:
        return float((runnable.outputs(call, mapped) - expected).norm()) <= TOLERANCE * float(expected.norm())

    if not leaves_alone(_with_other_values(heads)):
        raise UnsupportedModelError(
            f"Something stands between the values of {runnable.path} and its output projection, a norm perhaps, so "
            "that heads cannot share values; they are not converted."
        )
    size = heads.k.shape[1]
    for freedom in Freedom:
        for pairs, free in _candidates(size, call, config):
            maps = KeyMaps(pairs, free, freedom)
            if leaves_alone(_mapped(heads, maps)):
                return maps
    raise UnsupportedModelError(
        f"{runnable.path} computes something else when its own projections are written back to it; it attends in a "
        "way that is not known here, and its heads are not converted."
    )


def _with_other_values(heads: Heads) -> Heads:
    """Return heads whose values are mapped at random, each group its own way, and mapped back on the way out."""
    generator = torch.Generator().manual_seed(1)
    groups, size, _ = heads.v.shape
    maps = torch.eye(size) + 0.3 * torch.randn(groups, size, size, generator=generator) / size**0.5
    maps = maps.double().to(heads.v.device)
    back = maps.inverse().repeat_interleave(len(heads.q) // groups, 0)  # [H, Dv, Dv]
    return replace(
        heads,
        v=(maps @ heads.v.double()).to(heads.v),
        v_bias=None if heads.v_bias is None else (maps @ heads.v_bias.double()[..., None])[..., 0].to(heads.v_bias),
        o=torch.einsum("ehd,hdf->ehf", heads.o.double(), back).to(heads.o),
    )


def _candidates(size: int, call: RecordedCall, config: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield which numbers may be turned together: none; or those of two halves, or neighbours, of what rotates."""
    numbers = torch.arange(size)
    yield numbers[:0].view(0, 2), numbers
    widths = {size, *call.rotary_sizes()}
    for name in ("partial_rotary_factor", "rotary_pct"):
        shares = [getattr(config, name, None), (getattr(config, "rope_parameters", None) or {}).get(name)]
        widths |= {int(share * size) for share in shares if isinstance(share, float)}
    widths.add(getattr(config, "rotary_dim", None) or size)
    for width in sorted(w for w in widths if 0 < w <= size and w % 2 == 0):
        rotating, rest = numbers[:width], numbers[width:]
        yield torch.stack(rotating.chunk(2), 1), rest
        yield rotating.view(-1, 2), rest


def _mapped(heads: Heads, maps: KeyMaps) -> Heads:
    """Return heads whose keys are turned at random, each group its own way, and whose queries are turned back."""
    generator = torch.Generator().manual_seed(0)
    groups, group = len(heads.k), len(heads.q) // len(heads.k)
    k = torch.cat([heads.k, _column(heads.k_bias, heads.k)], -1).double().cpu()
    q = torch.cat([heads.q, _column(heads.q_bias, heads.q)], -1).double().cpu()

    def draw(count: int) -> Tensor:
        """Complex numbers [groups, count] as the freedom allows."""
        angles = 2 * torch.pi * torch.rand(groups, count, generator=generator, dtype=torch.float64)
        signs = torch.randint(2, (groups, count), generator=generator).double() * 2 - 1
        ones = torch.ones(groups, count, dtype=torch.float64)
        if maps.freedom is Freedom.NONE:
            return torch.polar(ones, 0 * ones)
        if maps.freedom is Freedom.SIGNS:
            return torch.complex(signs, 0 * signs)
        lengths = ones if maps.freedom is Freedom.TURNS else 0.5 + 1.5 * torch.rand(ones.shape, generator=generator)
        return torch.polar(lengths.double(), angles)

    pairs = draw(len(maps.pairs))
    for values, factors in ((k, pairs), (q, (1 / pairs.conj()).repeat_interleave(group, 0))):
        turned = torch.complex(values[:, maps.pairs[:, 0]], values[:, maps.pairs[:, 1]]) * factors[..., None]
        values[:, maps.pairs[:, 0]], values[:, maps.pairs[:, 1]] = turned.real, turned.imag
    if maps.freedom is Freedom.ANY:
        count = len(maps.free)
        mixing = torch.eye(count) + 0.3 * torch.randn(groups, count, count, generator=generator) / max(1, count) ** 0.5
        k[:, maps.free] = mixing.double() @ k[:, maps.free]
        back = mixing.double().inverse().mT.repeat_interleave(group, 0)
        q[:, maps.free] = back @ q[:, maps.free]
    elif maps.freedom is not Freedom.NONE:
        signs = torch.randint(2, (groups, len(maps.free), 1), generator=generator).double() * 2 - 1
        k[:, maps.free] *= signs
        q[:, maps.free] *= signs.repeat_interleave(group, 0)
    return replace(
        heads,
        q=q[..., :-1].to(heads.q),
        k=k[..., :-1].to(heads.k),
        q_bias=None if heads.q_bias is None else q[..., -1].to(heads.q),
        k_bias=None if heads.k_bias is None else k[..., -1].to(heads.k),
    )


def _column(bias: Tensor | None, weight: Tensor) -> Tensor:
    """Return a bias [heads, size] as the last column [heads, size, 1] of its weight; zeros where there is none."""
    return torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None]
