"""Groups of input columns in any order, as files hold them, brought into the order in which kernels read them.

A file may say of every column which group it belongs to (`g_idx`). Kernels take groups of adjacent columns, so columns
are sorted by their groups, and a product then gathers its input in that order: the same sums of the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_accel.kernels.weights import QUANTUM
from hf_accel.ops.affine import Affine, Scheme


def grouped(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, index: Tensor
) -> tuple[Affine, Tensor | None]:
    """Return a weight with adjacent groups, and the column of the file that each of its columns is; None: the same.

    Args:
        codes: int8 [N, K], signed.
        scales: [N, groups], kept to the bit.
        zeros: int8 [N, groups], signed; None: all are 0.
        bits: of a code.
        index: group of each column, integers [K] from 0 to groups - 1.

    Raises:
        ValueError: groups are not of whole multiples of 32 columns.
    """
    columns, symmetric = codes.shape[1], zeros is None
    if scales.shape[1] == 1:
        return Affine(codes, scales, zeros, Scheme(bits, None, symmetric)), None
    order = None
    if bool((index[1:] < index[:-1]).any()):
        order = torch.argsort(index, stable=True)
        index, codes = index[order], codes[:, order]
    counts = torch.unique_consecutive(index, return_counts=True)[1].tolist()
    unit = math.gcd(*counts)
    if unit % QUANTUM:
        raise ValueError(f"groups of {unit} columns (multiples of {QUANTUM} are served)")
    first = index[::unit]
    if len(first) != scales.shape[1] or bool((first != torch.arange(len(first))).any()):
        # a shorter last group, or one that no column is in: the scale of a group is repeated for each part of it
        scales = scales[:, first].contiguous()
        zeros = None if zeros is None else zeros[:, first].contiguous()
    return Affine(codes.contiguous(), scales, zeros, Scheme(bits, unit if unit < columns else None, symmetric)), order


def group_index(order: Tensor, group_size: int) -> Tensor:
    """Return the group of each column of a file, int32 [K], for columns that are stored in this order."""
    index = torch.empty(len(order), dtype=torch.int32)
    index[order.cpu()] = torch.arange(len(order), dtype=torch.int32) // group_size
    return index
