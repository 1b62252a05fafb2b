"""The tensors of AWQ (AutoAWQ's GEMM and GEMV), read into packed weights: 4 bits, zeros as they are.

GEMM holds a weight [N, K] with G groups as `qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8] and `scales` [G, N];
the nibbles of a word are output columns in an order of its own. GEMV holds `qweight` int32 [N, K / 8], the dense
stream, and `qzeros` and `scales` by rows, padded to whole words. (Lin et al. 2023.) Scaling is folded into weights and
norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files import bitstream
from hf_accel.quantization.files.formats import signed
from hf_accel.quantization.files.grouping import grouped
from hf_accel.quantization.files.layout import INTEGERS, Source, Stored

BITS = 4
_PER_WORD = 8
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # output column of each nibble of a GEMM word


@dataclass(frozen=True)
class Awq:
    """A product in the tensors of AWQ; is_gemv: in those of its GEMV kernels."""

    group_size: int | None
    is_gemv: bool

    @property
    def scheme(self) -> Scheme:
        return Scheme(BITS, self.group_size, False)

    def read(self, source: Source, rows: int, columns: int) -> Stored:
        """Return the weight [rows, columns].

        Raises:
            CheckpointError: a tensor is missing or damaged, or the groups cannot be served.
        """
        group = min(self.group_size or columns, columns)
        if columns % group:
            raise source.damaged("qweight", f"groups of {group} do not divide its {columns} columns")
        if (columns if self.is_gemv else rows) % _PER_WORD:
            raise source.damaged("qweight", f"{rows} rows of {columns} columns do not fill words of {_PER_WORD} codes")
        read = self._gemv if self.is_gemv else self._gemm
        codes, zeros, scales = read(source, rows, columns, columns // group)
        signed_zeros = signed(zeros, BITS)
        try:
            return Stored(
                *grouped(
                    signed(codes, BITS).contiguous(),
                    scales.contiguous(),
                    signed_zeros.contiguous() if bool(signed_zeros.any()) else None,
                    BITS,
                    torch.arange(columns) // group,
                )
            )
        except ValueError as error:
            raise source.damaged("qweight", f"the checkpoint describes {error}") from error

    @staticmethod
    def _gemm(source: Source, rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        words = source.tensor("qweight", (columns, rows // _PER_WORD), INTEGERS)
        zeros = source.tensor("qzeros", (groups, rows // _PER_WORD), INTEGERS)
        scales = source.scales("scales", (groups, rows))
        return _ordered(words, rows).T, _ordered(zeros, rows).T, scales.T

    @staticmethod
    def _gemv(source: Source, rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        multiple = max(1, 128 // (columns // groups))
        width = -(-groups // _PER_WORD)
        width = -(-width // multiple) * multiple
        words = source.tensor("qweight", (rows, columns // _PER_WORD), INTEGERS)
        zeros = source.tensor("qzeros", (rows, width), INTEGERS)
        scales = source.scales("scales", (rows, width * _PER_WORD))
        return bitstream.unpack(words, BITS, columns), bitstream.unpack(zeros, BITS, groups), scales[:, :groups]


def _ordered(words: Tensor, rows: int) -> Tensor:
    """Return the codes uint8 [n, rows] of GEMM words int32 [n, rows / 8], in the order of the output columns."""
    nibbles = bitstream.unpack(words, BITS, rows).view(len(words), -1, _PER_WORD)
    codes = torch.empty_like(nibbles)
    codes[..., list(_NIBBLES)] = nibbles
    return codes.view(len(words), rows)
