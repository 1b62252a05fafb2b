"""The zeros of GPTQ files, whose label says how they are stored, and often lies.

A file of version 2 stores a zero z from 0 to 2^bits - 1 as it is, one of version 1 stores z - 1. Packers of version 1
subtract one constant from every 32-bit word, so that z = 0 borrows from its neighbours; at 3 bits, where fields
straddle words, they subtract field by field. It is undone in the same way. Symmetric files have the zero 2^(bits - 1)
everywhere, which tells the version whatever the label says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.quantization.files import bitstream
from hf_accel.quantization.files.layout import Source

V1, V2 = 1, 2
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a 1 in every field of a word


class Zeros:
    """Decodes the zeros of one checkpoint whose label says that they are of `version`.

    Where symmetric products show another version than the label, the label is known to lie; zeros that only the label
    could explain are refused then.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self._liar = ""  # a symmetric product that shows the other version
        self._trusting = ""  # a product that was read by the label

    def read(self, source: Source, words: Tensor, bits: int, rows: int, symmetric: bool | None) -> Tensor | None:
        """Return the signed zeros int8 [rows, groups] of `qzeros` [groups, words]; None where all are 0.

        symmetric: what the checkpoint says of the product; None: nothing.

        Raises:
            CheckpointError: the zeros contradict what the checkpoint says of them, or were destroyed by their writer.
        """
        half = 1 << bits - 1
        fields = bitstream.unpack(words, bits, rows)
        lowest, highest = (int(bound) for bound in fields.aminmax())
        if lowest == highest and lowest in (half - 1, half):
            self._note_symmetric(source, V2 if lowest == half else V1, symmetric)
            return None
        if symmetric:
            raise source.damaged(
                "qzeros",
                f"the checkpoint's label says that it is symmetric, but it holds zeros from {lowest} to {highest} "
                f"instead of {half - 1} (version 1) or {half} (version 2) throughout",
            )
        self._trusting = self._trusting or source.name
        self._check_trust(source)
        if self.version == V1:
            fields = undone(words, bits, rows)
            if _is_destroyed(fields, bits):
                raise source.damaged(
                    "qzeros",
                    "above every zero of 0 its words have all their bits set: the packer joined negative numbers, "
                    "which destroyed what was there. It cannot be mended; quantize the model anew, into 'gptq_v2'",
                )
        return (fields.to(torch.int16) - half).to(torch.int8).T.contiguous()

    def _note_symmetric(self, source: Source, version: int, symmetric: bool | None) -> None:
        if version == self.version:
            return
        if symmetric is False:
            raise source.damaged(
                "qzeros",
                f"all its zeros are those of a symmetric checkpoint of version {version}, but the label says version "
                f"{self.version} and not symmetric; which of the two is wrong cannot be decided. Correct the label",
            )
        self._liar = self._liar or source.name
        self._check_trust(source)

    def _check_trust(self, source: Source) -> None:
        if self._liar and self._trusting:
            raise source.damaged(
                "qzeros",
                f"the label says that zeros are stored as in version {self.version}, the symmetric {self._liar} shows "
                f"that they are not, and nothing but the label says how those of {self._trusting} are. Correct the "
                "label",
            )


def undone(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the zeros uint8 [groups, count], from 0 to 2^bits - 1, of words of version 1, int32 [groups, words]."""
    if bits == 3:
        return bitstream.unpack(words, bits, count) + 1 & 7
    return bitstream.unpack(words + torch.tensor(_ONES[bits], dtype=torch.int32), bits, count)


def done(zeros: Tensor, bits: int) -> Tensor:
    """Return the words of version 1, int32 [groups, words], of zeros uint8 [groups, count]."""
    if bits == 3:
        return bitstream.pack(zeros - 1 & 7, bits)
    return bitstream.pack(zeros, bits) - torch.tensor(_ONES[bits], dtype=torch.int32)


def _is_destroyed(zeros: Tensor, bits: int) -> bool:
    """Return whether zeros [groups, count] of version 1 look as if fields above a negative one were overwritten.

    A field of -1 that is joined by OR sets all bits above it, too; one more in every field then makes it 0, and those
    above 1.
    """
    if bits == 3:
        return False
    fields = zeros.view(len(zeros), -1, 32 // bits)
    above = (fields == 0).cumsum(-1)[..., :-1] > 0  # of fields from 1 on: whether there is a 0 below
    return bool(above.any()) and bool((fields[..., 1:][above] == 1).all())
