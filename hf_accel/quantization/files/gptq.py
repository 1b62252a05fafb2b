"""The tensors of GPTQ, which AutoRound uses, too: read into packed weights, and written from them.

A weight [N, K] with G groups is `qweight` int32 [K bits / 32, N] (codes from 0 on, packed down the input columns),
`qzeros` int32 [G, N bits / 32] (packed along the outputs), `scales` [G, N], and `g_idx` int32 [K], the group of each
column, without which groups are of adjacent columns. Scales may be negative. (Frantar et al. 2023, and the files of
AutoGPTQ, GPTQModel and AutoRound.) K and N are multiples of 32. Cost: a copy of one weight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files import bitstream
from hf_accel.quantization.files.formats import signed
from hf_accel.quantization.files.grouping import group_index, grouped
from hf_accel.quantization.files.layout import INDICES, INTEGERS, Source, Stored
from hf_accel.quantization.files.pack_quantized import check_index
from hf_accel.quantization.files.zeros import V1, Zeros, done

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
MULTIPLE = 32  # of rows and columns


@dataclass(frozen=True)
class Gptq:
    """A product in the tensors of GPTQ.

    symmetric: None where the checkpoint does not say; needs_order: columns are grouped in an order that only `g_idx`
    tells; zeros: what is known of the checkpoint's zeros.
    """

    bits: int
    group_size: int | None
    symmetric: bool | None
    needs_order: bool
    zeros: Zeros

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.symmetric is not False)

    def read(self, source: Source, rows: int, columns: int) -> Stored:
        """Return the weight [rows, columns].

        Raises:
            CheckpointError: a tensor is missing or damaged, contradicts the others, or cannot be served.
        """
        bits = self.bits
        if rows % MULTIPLE or columns % MULTIPLE:
            raise source.damaged(
                "qweight",
                f"it stands for {rows} rows and {columns} columns; the layout has multiples of {MULTIPLE} only",
            )
        group = min(self.group_size or columns, columns)
        groups = -(-columns // group)
        words = source.tensor("qweight", (columns * bits // 32, rows), INTEGERS)
        scales = source.scales("scales", (groups, rows)).T.contiguous()
        packed_zeros = source.tensor("qzeros", (groups, rows * bits // 32), INTEGERS)
        zeros = self.zeros.read(source, packed_zeros, bits, rows, self.symmetric)
        codes = signed(bitstream.unpack(words.T, bits, columns), bits)
        index = self._index(source, columns, group, groups)
        try:
            return Stored(*grouped(codes, scales, zeros, bits, index))
        except ValueError as error:
            raise source.damaged("qweight", f"the checkpoint describes {error}") from error

    def _index(self, source: Source, columns: int, group: int, groups: int) -> Tensor:
        if "g_idx" not in source:
            if self.needs_order and groups > 1:
                raise source.damaged("g_idx", "it is missing, but the checkpoint says that columns are grouped by it")
            return torch.arange(columns) // group
        index = source.tensor("g_idx", (columns,), INDICES).long()
        index = torch.where(index < 0, index + groups, index)  # counted from the end
        check_index(source, "g_idx", index, groups, group)
        return index


def to_tensors(weight: Affine, order: Tensor | None, scale_dtype: torch.dtype, version: int) -> dict[str, Tensor]:
    """Return the tensors of a quantized weight, zeros as `version` stores them.

    order: the column of the model that each column of the weight reads, where they differ.
    """
    columns = weight.codes.shape[1]
    bits, half = weight.scheme.bits, 1 << weight.scheme.bits - 1
    group = weight.scheme.columns_per_scale(columns)
    scales = weight.scales.T.to(scale_dtype).contiguous()
    codes = weight.codes if order is None else weight.codes[:, torch.argsort(order)]
    zeros = torch.zeros_like(scales, dtype=torch.int8) if weight.zeros is None else weight.zeros.T
    zeros = (zeros.to(torch.int16) + half).to(torch.uint8)
    return {
        "qweight": bitstream.pack((codes.to(torch.int16) + half).to(torch.uint8), bits).T.contiguous(),
        "qzeros": done(zeros, bits) if version == V1 else bitstream.pack(zeros, bits),
        "scales": scales,
        "g_idx": (torch.arange(columns, dtype=torch.int32) // group if order is None else group_index(order, group)),
    }


def stored_bytes(scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, int]:
    """Return name -> bytes of the tensors that a weight [rows, columns] is stored as."""
    groups = columns // scheme.columns_per_scale(columns)
    return {
        "qweight": columns * scheme.bits // 8 * rows,
        "qzeros": groups * rows * scheme.bits // 8,
        "scales": groups * rows * scale_dtype.itemsize,
        "g_idx": 4 * columns,
    }
