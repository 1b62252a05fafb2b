"""Fewer heads in closed form: which heads share, and the keys and values that they share.

"aligned": heads are grouped by what they do on calibration text, turned into each other, and approximated by what they
have in common. For values any map will do: its inverse goes to the output projection, and the group shares the subspace
of fewest losses. Keys have the maps that scores allow (`KeyMaps`): of a rotary embedding one complex number for each
pair; their inverses go to the queries. The outputs' errors that both cause are weighed against each other.
"mean" and "first" pool neighbours as they are (Ainslie et al. 2023, arXiv:2305.13245, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_accel.errors import ConfigError
from hf_accel.gqa.grouping import Groups, balanced, neighbours
from hf_accel.gqa.heads import Heads
from hf_accel.gqa.maps import Freedom, KeyMaps
from hf_accel.gqa.sensitivity import KeyCosts
from hf_accel.gqa.stacks import Stack

RANK_TOLERANCE = 1e-12  # of the largest eigenvalue of the inputs' second moment


@dataclass(frozen=True)
class Seen:
    """What a layer is seen to do on calibration text.

    moment [E + 1, E + 1]: the second moment of its inputs, with a one as the last input, in fp64.
    costs: of errors in keys.
    """

    moment: Tensor
    costs: KeyCosts


def pooled(heads: Heads, kv_heads: int, method: str) -> Heads:
    """Return heads of which neighbours share the mean of their keys and values ("mean"), or the first one's."""
    own, queries = len(heads.k), len(heads.q)
    of_queries = torch.arange(queries) // (queries // own)  # which key head each query head reads
    groups = of_queries.view(kv_heads, -1)

    def pool(values: Tensor) -> Tensor:
        return values[groups[:, 0]] if method == "first" else values[groups].mean(1)

    k_bias, v_bias = (None if bias is None else pool(bias) for bias in (heads.k_bias, heads.v_bias))
    return replace(heads, k=pool(heads.k), v=pool(heads.v), k_bias=k_bias, v_bias=v_bias)


def aligned(heads: Heads, kv_heads: int, seen: Seen, maps: KeyMaps, *, is_fixed: bool) -> tuple[Heads, Groups]:
    """Return heads with `kv_heads`, and which query heads share each; query heads come in the order of their groups.

    is_fixed: query heads cannot change places, so neighbours share.

    Raises:
        ConfigError: the calibration text tells too little of the layer.
    """
    _check_moment(seen.moment, heads.k.shape[1])
    group = len(heads.q) // len(heads.k)
    q = _joined(heads.q, heads.q_bias)
    k, v = (_joined(*part).repeat_interleave(group, 0) for part in ((heads.k, heads.k_bias), (heads.v, heads.v_bias)))
    o = heads.o.permute(1, 0, 2).double().cpu()
    values = Stack(v[None], (o.mT @ o)[None], seen.moment)
    sizes = torch.ones(len(k), dtype=k.dtype)
    if maps.freedom is not Freedom.ANY:  # a norm follows, which makes keys of one size
        sizes = _power(k, seen.moment).mean(-1).sqrt().clamp_min(1e-300)
    keys = _key_parts(q, k / sizes[:, None, None], seen, maps)

    def cost(group: tuple[int, ...]) -> float:
        return values.lost(group) + sum(part.stack.lost(group) for part in keys)

    groups = neighbours(len(q), kv_heads) if is_fixed else balanced(len(q), kv_heads, cost)
    order = torch.as_tensor([head for group in groups for head in group])
    q, o = q[order], o[order]
    new_k, new_v = (torch.empty(kv_heads, *t.shape[1:], dtype=t.dtype) for t in (k, v))
    for index, members in enumerate(groups):
        own = slice(index * len(members), (index + 1) * len(members))
        for part in keys:
            part.share(members, q[own], new_k[index])
        new_k[index] *= sizes[list(members)].mean()
        found = values.shared(members)
        new_v[index] = found.rows[0]
        o[own] = o[own] @ found.factors[0]
    made = [
        (weight[..., :-1].contiguous().to(heads.q), None if bias is None else weight[..., -1].contiguous().to(bias))
        for weight, bias in ((q, heads.q_bias), (new_k, heads.k_bias), (new_v, heads.v_bias))
    ]
    (q, q_bias), (k, k_bias), (v, v_bias) = made
    return Heads(q, k, v, o.permute(1, 0, 2).contiguous().to(heads.o), q_bias, k_bias, v_bias, heads.o_bias), groups


@dataclass(frozen=True)
class _KeyPart:
    """Numbers of a head whose keys are shared together: pairs [P, 2], or all of [1, F], or each alone [F, 1]."""

    numbers: Tensor
    stack: Stack

    def share(self, members: tuple[int, ...], q: Tensor, k: Tensor) -> None:
        """Write what the members share to the key head k [D, X], and turn their queries q [n, D, X] in its place."""
        found = self.stack.shared(members)
        if found.rows.is_complex():
            real, imaginary = self.numbers.unbind(1)
            k[real], k[imaginary] = found.rows[:, 0].real, found.rows[:, 0].imag
            turned = torch.complex(q[:, real], q[:, imaginary]) * found.factors[..., 0].transpose(0, 1).conj()
            q[:, real], q[:, imaginary] = turned.real, turned.imag
        else:
            k[self.numbers] = found.rows
            q[:, self.numbers] = (found.factors.mT @ q[:, self.numbers].transpose(0, 1)).transpose(0, 1)


def _key_parts(q: Tensor, k: Tensor, seen: Seen, maps: KeyMaps) -> list[_KeyPart]:
    """Return how keys [H, D, X] are shared, errors in them weighed by what they were seen to cost."""
    found = []
    is_any = maps.freedom is Freedom.ANY
    if len(maps.pairs):
        rows = torch.complex(k[:, maps.pairs[:, 0]], k[:, maps.pairs[:, 1]]).transpose(0, 1)
        metric = seen.costs.pairs / _power(rows, seen.moment).clamp_min(1e-300)  # [P, H]
        metric = metric if is_any else metric.mean(1, keepdim=True).expand_as(metric)
        stack = Stack(rows[:, :, None], metric.to(rows.dtype)[..., None, None], seen.moment, freedom=maps.freedom)
        found.append(_KeyPart(maps.pairs, stack))
    if len(maps.free):
        mean = seen.moment[:, -1]
        # what all keys have in common moves all scores of a query alike, and the softmax does not see it
        moment = seen.moment - torch.outer(mean, mean)
        rows, queries = k[:, maps.free], q[:, maps.free]
        # what a score is off by costs the same wherever it comes from; by how much, the trial with `mixing` tells
        power, mixing = queries @ seen.moment @ queries.mT, seen.costs.mixing
        moved = ((mixing.T @ power @ mixing) * (rows @ moment @ rows.mT)).sum((1, 2))
        metric = power * (seen.costs.free / moved.clamp_min(1e-300))[:, None, None]
        if is_any:
            found.append(_KeyPart(maps.free[None], Stack(rows[None], metric[None], moment)))
        else:
            alone = metric.diagonal(dim1=1, dim2=2).mean(0)[:, None].expand(-1, len(q))[..., None, None]
            by_number = rows.transpose(0, 1)[:, :, None]
            found.append(_KeyPart(maps.free[:, None], Stack(by_number, alone, seen.moment, freedom=maps.freedom)))
    return found


def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a weight [heads, size, E] in fp64 with its bias as the last column; zeros where there is none."""
    column = torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None]
    return torch.cat([weight, column], -1).double().cpu()


def _power(rows: Tensor, moment: Tensor) -> Tensor:
    """Return the mean square of each of the rows [..., X], real or complex, over inputs."""
    return ((rows @ moment.to(rows.dtype)) * rows.conj()).sum(-1).real


def _check_moment(moment: Tensor, size: int) -> None:
    if not bool(moment.isfinite().all()):
        raise ConfigError("The inputs of a layer are NaN or infinite on the calibration text. Give other text.")
    values = torch.linalg.eigvalsh(moment)
    rank = int((values > RANK_TOLERANCE * values[-1]).sum())
    if rank < size:
        raise ConfigError(
            f"On the calibration text the inputs of a layer span {rank} directions, and a head has {size} numbers, so "
            "heads cannot be told apart. Give text that is more varied."
        )
