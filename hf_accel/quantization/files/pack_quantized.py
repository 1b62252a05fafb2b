"""Reads products in the `pack-quantized` layout of compressed-tensors, its 3-bit words of before June 2026 included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files.formats import from_tensors, signed, stored_names, stored_shapes
from hf_accel.quantization.files.grouping import grouped
from hf_accel.quantization.files.layout import INDICES, INTEGERS, Source, Stored

_KINDS: dict[str, Any] = {"weight_scale": (), "weight_shape": ((torch.int64, torch.int32),)}
_SPARSE_CODES = 10  # of 3 bits in a word, two bits of which were left unused


@dataclass(frozen=True)
class PackQuantized:
    """A product in `pack-quantized`; has_order: its columns may be grouped in another order (`weight_g_idx`)."""

    scheme: Scheme
    has_order: bool = False

    def read(self, source: Source, rows: int, columns: int) -> Stored:
        """Return the weight [rows, columns].

        Raises:
            CheckpointError: a tensor is missing or damaged; or the words of 3 bits may be of either layout.
        """
        scheme = self.scheme
        if columns % scheme.columns_per_scale(columns):
            raise source.damaged("weight_packed", f"groups of {scheme.group_size} do not divide its {columns} columns")
        shapes = stored_shapes(scheme, rows, columns)
        is_sparse = scheme.bits == 3 and _is_sparse(source, scheme, rows, columns)
        if is_sparse:
            shapes |= _sparse_shapes(scheme, rows, columns)
        tensors = {
            suffix: source.tensor(suffix, shapes[suffix], *_KINDS.get(suffix, (INTEGERS,)))
            if suffix != "weight_scale"
            else source.scales(suffix, shapes[suffix])
            for suffix in stored_names(scheme)
        }
        if tensors["weight_shape"].tolist() != [rows, columns]:
            raise source.damaged(
                "weight_shape",
                f"it says {tensors['weight_shape'].tolist()}; the model's config asks for {[rows, columns]}",
            )
        decoded = _from_sparse if is_sparse else from_tensors
        weight = decoded(tensors, scheme, rows, columns)
        if not self.has_order or scheme.group_size is None:
            return Stored(weight, None)
        index = source.tensor("weight_g_idx", (columns,), INDICES).long()
        if bool((index == -1).all()):  # what the package leaves where it did not order
            index = torch.arange(columns) // scheme.group_size
        check_index(source, "weight_g_idx", index, weight.scales.shape[1], scheme.columns_per_scale(columns))
        try:
            return Stored(*grouped(weight.codes, weight.scales, weight.zeros, scheme.bits, index))
        except ValueError as error:
            raise source.damaged("weight_g_idx", f"it describes {error}") from error


def check_index(source: Source, suffix: str, index: Tensor, groups: int, group_size: int) -> None:
    """Find out whether a group index [K] gives every group its columns.

    Raises:
        CheckpointError: it names a group that there is none of, or gives one more columns than it can have.
    """
    lowest, highest = (int(bound) for bound in index.aminmax())
    if lowest < 0 or highest >= groups:
        raise source.damaged(suffix, f"it names the group {lowest if lowest < 0 else highest}; there are {groups}")
    most = int(torch.bincount(index, minlength=groups).max())
    if most > group_size:
        raise source.damaged(suffix, f"it gives one group {most} columns; groups have {group_size}")


def _sparse_shapes(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    groups = columns // scheme.columns_per_scale(columns)
    found: dict[str, tuple[int, ...]] = {"weight_packed": (rows, -(-columns // _SPARSE_CODES))}
    return found if scheme.symmetric else found | {"weight_zero_point": (-(-rows // _SPARSE_CODES), groups)}


def _is_sparse(source: Source, scheme: Scheme, rows: int, columns: int) -> bool:
    """Return whether words of 3 bits hold ten codes, as they did before the layout became a dense stream.

    Raises:
        CheckpointError: the widths are those of both layouts, and no stamp of ours says that it is the dense one.
    """
    found = {name: source.shape(name) for name in _sparse_shapes(scheme, rows, columns)}
    dense = stored_shapes(scheme, rows, columns)
    is_dense = all(shape == dense[name] for name, shape in found.items())
    is_sparse = found == _sparse_shapes(scheme, rows, columns)
    if is_dense and is_sparse and not source.is_ours("weight_packed"):
        raise source.damaged(
            "weight_packed",
            f"{columns} columns of 3 bits take as many words in the dense layout as in that of before June 2026, ten "
            "codes per word, and nothing says which it is; have the tool that wrote it write another width",
        )
    return is_sparse and not is_dense


def _from_sparse(tensors: dict[str, Tensor], scheme: Scheme, rows: int, columns: int) -> Affine:
    zeros = None
    if not scheme.symmetric:
        zeros = _sparse_codes(tensors["weight_zero_point"].T, rows).T.contiguous()
    return Affine(_sparse_codes(tensors["weight_packed"], columns), tensors["weight_scale"].clone(), zeros, scheme)


def _sparse_codes(words: Tensor, count: int) -> Tensor:
    shifts = torch.arange(0, 3 * _SPARSE_CODES, 3, dtype=torch.int32)
    codes = (words[..., None] >> shifts & 7).flatten(1)[:, :count]
    return signed(codes, 3).contiguous()
