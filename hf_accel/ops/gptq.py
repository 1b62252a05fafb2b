"""GPTQ: codes that keep the outputs of a product close, not its weight (Frantar et al. 2023, arXiv:2210.17323).

Columns are rounded one after the other, and what rounding a column does to the outputs is taken out of the columns
that follow: with H = sum x x^T of the inputs and U the upper Cholesky factor of H^-1, the error e = (w - q) / U_kk of
column k changes the later ones by -e U_k. Everything is computed in fp64. Cost: K^3 operations for a Hessian of K
inputs, N K^2 for a weight [N, K]; memory: four matrices [K, K] and two copies of the weight in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme, quantize, quantize_groups

_BLOCK = 64  # columns whose errors go to the columns behind them at once
_ROWS_BYTES = 64 << 20  # of the systems of equations that are solved together
_MORE_DAMPING = 10.0  # where a Hessian cannot be factored
_TRIES = 6
_RIDGE = 1e-9  # keeps the scale of a group whose codes are all zero


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for solving.

    hessian: fp64 [K, K], damped, in the order of columns `order` [K]; upper: U of it; is_dead [K]: inputs, in their own
    order, that were always zero; damping: the share of the mean diagonal that was added, more than asked for where
    that was needed to factor it.
    """

    hessian: Tensor
    upper: Tensor
    order: Tensor
    is_ordered: bool
    is_dead: Tensor
    damping: float

    @staticmethod
    def of(moment: Tensor, damping: float, is_ordered: bool) -> Factor:
        """Factor the second moment [K, K] of the inputs of a product; it is not changed.

        is_ordered: columns with large inputs come first, while later ones can still make up for their errors.

        Raises:
            ValueError: it is not finite, or cannot be factored with whatever damping.
        """
        if not bool(moment.isfinite().all()):
            raise ValueError("the second moment of the inputs is not finite")
        is_dead = moment.diagonal() <= 0
        order = torch.arange(len(moment), device=moment.device)
        if is_ordered:
            order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        hessian = moment[order[:, None], order].double()
        hessian.diagonal()[is_dead[order]] = 1.0
        mean, share, added = float(hessian.diagonal().mean()), damping, 0.0
        for _ in range(_TRIES):
            hessian.diagonal().add_((share - added) * mean)
            added = share
            if (upper := _inverse_factor(hessian)) is not None:
                return Factor(hessian, upper, order, is_ordered, is_dead, share)
            share = max(share, 1e-4) * _MORE_DAMPING
        raise ValueError(
            f"the second moment of the inputs cannot be factored, not even with {added:g} of its mean added"
        )


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse, None where there is none; at most two matrices beside it."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if int(failed) else upper


@dataclass(frozen=True)
class Solved:
    """A solved weight.

    affine: its codes and scales; values fp32 [N, K]: what each weight was, in steps of its scale, when it was rounded,
    so that it lies within half a step of its code unless that was clipped; loss: tr(E H E^T) for the error E.
    """

    affine: Affine
    values: Tensor
    loss: float


def solve(weight: Tensor, factor: Factor, scheme: Scheme, scale_dtype: torch.dtype, refits: int = 1) -> Solved:
    """Return the codes of weight [N, K] (any float dtype) for inputs with the Hessian `factor`.

    Scales are those of rounding to nearest, of the original weight where columns are ordered, and otherwise of the
    weight as it is compensated when its group is reached. Then, `refits` times, scales are fitted to the codes by least
    squares on the same Hessian and codes found anew; the least loss is kept.

    Raises:
        ValueError: the group size does not divide K.
    """
    n, k = weight.shape
    group = scheme.columns_per_scale(k)
    if k % group:
        raise ValueError(f"groups of {group} do not divide {k} columns")
    original = weight.detach().double().masked_fill(factor.is_dead, 0.0)
    scales: Tensor | None = None
    zeros: Tensor | None = None
    if factor.is_ordered:
        scales, zeros = _grid(original.view(n, k // group, group), scheme, scale_dtype)
    best = _solved(original, factor, scheme, scale_dtype, scales, zeros)
    for _ in range(refits):
        fitted = _fitted(original, factor, best.affine)
        found = _solved(original, factor, scheme, scale_dtype, fitted.to(scale_dtype), best.affine.zeros)
        if not found.loss < best.loss:
            break
        best = found
    return best


def rounded(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Solved:
    """Return weight [N, K] rounded to nearest, as `solve` returns what it solves; the loss is not known."""
    affine = quantize(weight, scheme, scale_dtype)
    scales, zeros = _by_column(affine)
    return Solved(affine, (weight.double() / scales + zeros).float(), math.nan)


def loss(weight: Tensor, affine: Affine, hessian: Tensor) -> float:
    """Return tr(E H E^T) for the error E of a quantized weight [N, K] against `weight`, with H [K, K]."""
    scales, zeros = _by_column(affine)
    return energy(weight.double() - (affine.codes.double() - zeros) * scales, hessian)


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Return tr(W H W^T): the squared outputs that a loss is a part of."""
    weight = weight.double()
    return float(torch.einsum("nk,nk->", weight @ hessian, weight))


def _grid(grouped: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return scales in `dtype` and zeros int8 [N, G] of groups [N, G, g], as rounding to nearest has them."""
    _, scales, zeros = quantize_groups(grouped.float(), scheme, dtype)
    return scales.squeeze(-1).to(dtype), None if zeros is None else zeros.squeeze(-1).to(torch.int8)


def _by_column(affine: Affine) -> tuple[Tensor, Tensor]:
    """Return scales and zeros fp64 [N, K], a value for every column."""
    group = affine.codes.shape[1] // affine.scales.shape[1]
    scales = affine.scales.double().repeat_interleave(group, dim=1)
    zeros = torch.zeros_like(scales) if affine.zeros is None else affine.zeros.double().repeat_interleave(group, dim=1)
    return scales, zeros


def _solved(
    original: Tensor,
    factor: Factor,
    scheme: Scheme,
    dtype: torch.dtype,
    scales: Tensor | None,
    zeros: Tensor | None,
) -> Solved:
    """Solve with the given scales and zeros [N, G]; with None each group's are found when it is reached."""
    n, k = original.shape
    group = scheme.columns_per_scale(k)
    finds_scales = scales is None
    if scales is None:
        scales = torch.ones(n, k // group, dtype=dtype, device=original.device)
        zeros = None if scheme.symmetric else torch.zeros(n, k // group, dtype=torch.int8, device=original.device)
    columns = original[:, factor.order].T.contiguous()  # [K, N]: a column of the weight is a row
    codes = torch.empty(k, n, dtype=torch.int8, device=original.device)
    values = torch.empty(k, n, dtype=torch.float32, device=original.device)
    homes = (factor.order // group).tolist()
    total = 0.0
    for start in range(0, k, _BLOCK):
        stop = min(k, start + _BLOCK)
        errors = torch.empty(stop - start, n, dtype=torch.float64, device=original.device)
        for column in range(start, stop):
            if finds_scales and column % group == 0:
                # the columns of this block have all errors so far, those behind it only those of earlier blocks
                ahead = columns[column : column + group].clone()
                if column + group > stop:
                    ahead[stop - column :] -= (
                        factor.upper[start:column, stop : column + group].T @ errors[: column - start]
                    )
                found = _grid(ahead.T.reshape(n, 1, group), scheme, dtype)
                scales[:, column // group] = found[0][:, 0]
                if zeros is not None and found[1] is not None:
                    zeros[:, column // group] = found[1][:, 0]
            scale = scales[:, homes[column]].double()
            value = columns[column] / scale
            zero = None if zeros is None else zeros[:, homes[column]].double()
            if zero is not None:
                value += zero
            code = value.round().clamp_(scheme.lowest, scheme.highest)
            codes[column], values[column] = code.to(torch.int8), value.float()
            rounded = (code if zero is None else code - zero) * scale
            error = (columns[column] - rounded) / factor.upper[column, column]
            columns[column + 1 : stop].addr_(factor.upper[column, column + 1 : stop], error, alpha=-1.0)
            errors[column - start] = error
        total += float(errors.square().sum())
        columns[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1.0)
    back = torch.argsort(factor.order)
    affine = Affine(codes[back].T.contiguous(), scales, zeros, scheme)
    return Solved(affine, values[back].T.contiguous(), total)


def _fitted(original: Tensor, factor: Factor, affine: Affine) -> Tensor:
    """Return the scales fp64 [N, G] that serve the codes best: least squares of each row's outputs.

    With c_g the codes of group g (less its zero, zero elsewhere) the outputs are a sum of s_g c_g, so that
    sum_h (c_g H c_h) s_h = c_g H w for every g.
    """
    n, k = original.shape
    count = affine.scales.shape[1]
    back = torch.argsort(factor.order)
    hessian = factor.hessian[back][:, back]
    group = k // count
    before = affine.scales.double()
    _, zeros = _by_column(affine)
    codes = affine.codes.double() - zeros
    fitted = torch.empty_like(before)
    for rows in _portions(n, max(1, _ROWS_BYTES // (8 * max(k, count * count)))):
        grouped = codes[rows].view(-1, count, group)
        products = torch.empty(len(grouped), count, count, dtype=torch.float64, device=original.device)
        for one in range(count):  # c_one H, then with every c
            part = grouped[:, one] @ hessian[one * group : (one + 1) * group]
            products[:, one] = (part.view(-1, count, group) * grouped).sum(dim=-1)
        residual = original[rows] - codes[rows] * before[rows].repeat_interleave(group, dim=1)
        wanted = ((residual @ hessian).view(-1, count, group) * grouped).sum(dim=-1)
        ridge = products.diagonal(dim1=1, dim2=2)
        ridge += _RIDGE * ridge.mean(dim=1, keepdim=True) + torch.finfo(torch.float64).tiny
        fitted[rows] = before[rows] + torch.linalg.solve(products, wanted)
    return torch.where(fitted.abs() > 0, fitted, before)


def _portions(count: int, most: int) -> Iterator[slice]:
    for first in range(0, count, most):
        yield slice(first, min(count, first + most))
