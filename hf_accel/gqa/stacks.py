"""What the heads of a group have in common: the subspace of fewest losses, from the singular values of their rows.

Keys of query head h are A_h x in a basis in which an error of one unit costs the same everywhere. Stacked over the
heads of a group, rows [n r, X] are approximated by rank r: A_h = U_h K with one K [r, X] for the group (Eckart and
Young 1936); the trailing eigenvalues of the stack's second moment are what is lost. Heads that are equal up to a map
that scores allow lose nothing. Cost: eigenvalues of an [n r, n r] matrix for a group of n heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.gqa.maps import Freedom

RANK_TOLERANCE = 1e-13  # of the largest eigenvalue of a metric, in double precision


@dataclass(frozen=True)
class Shared:
    """What a group shares: rows [P, r, X], and for each of its n heads the factor [P, n, r, r] on them."""

    rows: Tensor
    factors: Tensor


class Stack:
    """P parts of H heads, each of r rows over X inputs, real or complex: the heads of a group come to share r rows.

    rows [P, H, r, X]; metric [P, H, r, r]: what an error in the rows of a head costs, a positive semidefinite form.
    moment [X, X]: the second moment of the inputs. freedom: what stands between the rows of a head and those shared;
    with less than any map r is 1, and metrics are the same for all heads.
    """

    def __init__(self, rows: Tensor, metric: Tensor, moment: Tensor, *, freedom: Freedom = Freedom.ANY) -> None:
        self.rows, self.freedom = rows, freedom
        values, vectors = torch.linalg.eigh(metric)
        kept = values > RANK_TOLERANCE * values.amax(-1, keepdim=True).clamp_min(1e-300)
        roots = torch.where(kept, values, 0).sqrt()
        inverse = torch.where(kept, 1 / roots, 0)
        self.root = (vectors * roots[..., None, :]) @ vectors.mH
        self.unroot = (vectors * inverse[..., None, :]) @ vectors.mH
        self.weighted = self.root @ rows
        seen = self.weighted @ moment.to(rows.dtype)
        parts, heads, r = rows.shape[:3]
        flat = self.weighted.reshape(parts, heads * r, -1)
        self.gram = (seen.reshape(parts, heads * r, -1) @ flat.mH).view(parts, heads, r, heads, r)

    def _gram_of(self, group: Sequence[int]) -> Tensor:
        index = torch.as_tensor(group)
        parts, r, n = self.gram.shape[0], self.gram.shape[2], len(index)
        return self.gram[:, index][:, :, :, index].reshape(parts, n * r, n * r)

    def lost(self, group: Sequence[int]) -> float:
        """Return what sharing rows costs the heads of a group, in squared units of the metric."""
        gram, r = self._gram_of(group), self.gram.shape[2]
        if self.freedom is Freedom.ANY:
            lost = torch.linalg.eigvalsh(gram)[..., :-r]
        else:
            factors = self._rigid_factors(gram)[..., None]
            kept = (factors.mH @ gram @ factors)[..., 0, 0].real / len(group)
            lost = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1) - kept
        return float(lost.clamp_min(0).sum())

    def shared(self, group: Sequence[int]) -> Shared:
        """Return the rows that a group shares, as large as the rows of its heads are on the mean, and their factors."""
        index = torch.as_tensor(group)
        gram, r = self._gram_of(group), self.gram.shape[2]
        own = self.rows[:, index]
        if self.freedom is Freedom.ANY:
            vectors = torch.linalg.eigh(gram).eigenvectors[..., -r:].unflatten(1, (len(index), r))
            rows, factors = (vectors.mH @ self.weighted[:, index]).sum(1), self.unroot[:, index] @ vectors
        else:
            factors = self._rigid_factors(gram)[..., None, None]
            rows = (factors.mH @ own).mean(1)
        wanted, found = own.abs().square().mean((1, 2, 3)).sqrt(), rows.abs().square().mean((1, 2)).sqrt()
        scale = torch.where((found > 0) & (wanted > 0), wanted / found.clamp_min(1e-300), 1.0)[:, None, None]
        if self.freedom is Freedom.ANY:
            factors = factors / scale[:, None]
        return Shared(rows * scale, factors)

    def _rigid_factors(self, gram: Tensor) -> Tensor:
        """Return the factors [P, n] of modulus one nearest to the rows' leading eigenvector; the first is one."""
        if self.freedom is Freedom.NONE:
            return torch.ones_like(gram[..., 0])
        leading = torch.linalg.eigh(gram if self.freedom is Freedom.TURNS else gram.real).eigenvectors[..., -1]
        turned = leading * leading[:, :1].conj()
        sizes = turned.abs()
        return torch.where(sizes > 0, turned / sizes.clamp_min(1e-300), torch.ones_like(turned)).to(gram.dtype)
