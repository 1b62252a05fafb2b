"""Weights of 8, 4, 3 and 2 bits and of MXFP4 in the layout of the native kernels, and how weights are described to C.

Sixteen rows lie interleaved, so that a vector register holds one value of each: see `hfa_matrix` in csrc/native.h. The
layout is the same for all instruction sets. `packed` multiplies with such weights.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels import triton, vendor
from hf_accel.kernels.layout import LANES, QUANTUM, codes_shape, from_mxfp4, interleaved, row_by_row, to_mxfp4
from hf_accel.ops import fp4
from hf_accel.ops.affine import Affine, Scheme, dequantize

FORMATS: dict[int | str | None, int] = {None: 0, 8: 1, 4: 2, 2: 3, 3: 4, fp4.NAME: 5}
"""Code book or bits of a weight, or bits of keys and values -> `enum hfa_format`; None: values of the dtype."""
MATRIX = struct.Struct("=QQqqqQQqq")
"""`hfa_matrix`: weight, bias, stride, rows, inner, scales, offsets, format, group."""
_SCALES = {torch.int16: 0, torch.int32: 1, torch.uint8: 2, torch.uint16: 3}  # the dtype of scales -> the field `stride`
_VALUES = {torch.int16: torch.bfloat16, torch.uint16: torch.float16, torch.int32: torch.float32}


def dense_matrix(weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> bytes:
    """Return the `hfa_matrix` of a weight [N, K] (transposed: [K, N]) as it lies, with rows in one piece."""
    rows, inner = weight.shape[::-1] if transposed else weight.shape
    pointer = 0 if bias is None else bias.data_ptr()
    return MATRIX.pack(weight.data_ptr(), pointer, weight.stride(0), rows, inner, 0, 0, FORMATS[None], 0)


def transposed_matrix(weight: Tensor, bias: Tensor | None = None) -> bytes:
    """Return the `hfa_matrix` of a weight [N, K] that lies as [K, N], with rows of these in one piece."""
    pointer = 0 if bias is None else bias.data_ptr()
    return MATRIX.pack(weight.data_ptr(), pointer, weight.stride(1), *weight.shape, 0, 0, FORMATS[None], 1)


def moved_matrix(matrix: bytes, weight: int, scales: int = 0, offsets: int = 0) -> bytes:
    """Return an `hfa_matrix` whose weight, scales and offsets lie at other addresses, and its bias where it lay."""
    _, bias, stride, rows, inner, _, _, code, group = MATRIX.unpack(matrix)
    return MATRIX.pack(weight, bias, stride, rows, inner, scales, offsets, code, group)


@dataclass(eq=False)
class PackedWeight:
    """A quantized weight [rows, columns].

    codes: 8 bits int8 [R, Kp/2, 16, 2], 4 bits uint8 [R, Kp/8, 16, 4], 3 bits uint8 [R, Kp/32, 3, 16, 4], 2 bits uint8
    [R, Kp/16, 16, 4], fp4 as 4 bits; scales [R, groups, 16] as the bits of bf16 (int16), fp16 (uint16) or fp32 (int32)
    values, so that casting a model leaves them alone, those of fp4 as exponents (uint8); offsets int32 (fp32 bits) or
    None. R = ceil(rows / 16), Kp = columns rounded up to 32.
    """

    scheme: Scheme
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    _fields: dict[Any, bytes] = field(default_factory=dict, repr=False)
    _chosen: dict[tuple[int, torch.dtype, int], vendor.Product | None] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.columns))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.offsets) if t is not None)

    @staticmethod
    def pack(quantized: Affine) -> PackedWeight:
        """Lay out codes [N, K], scales and zeros.

        Raises:
            ValueError: groups are no multiples of 32 columns, or codes and scales are none of the scheme's code book.
        """
        return PackedWeight.join([quantized])

    @staticmethod
    def join(parts: Sequence[Affine]) -> PackedWeight:
        """Lay out the rows of several parts of one scheme below one another; all but the last have a multiple of 16.

        Raises:
            ValueError: as `pack`.
        """
        scheme, (n, k) = parts[0].scheme, parts[0].codes.shape
        groups = parts[0].scales.shape[1]
        if groups > 1 and k // groups % QUANTUM:
            raise ValueError(f"groups of {k // groups} columns cannot be packed: not a multiple of {QUANTUM}")
        laid_out = [_codes(part) for part in parts]
        codes = laid_out[0] if len(parts) == 1 else torch.cat(laid_out)
        n = sum(len(part.codes) for part in parts)
        scales = torch.cat([part.scales.float() for part in parts])
        if scheme.code_book:
            return PackedWeight(scheme, n, k, codes, _laid_out(fp4.exponents(scales)))
        bits = _laid_out(scales).view(torch.int32)
        for half, kind in ((torch.bfloat16, torch.int16), (torch.float16, torch.uint16)):
            if torch.equal(scales.to(half).float(), scales):
                bits = _laid_out(scales.to(half)).view(kind)
                break
        if parts[0].is_symmetric:
            return PackedWeight(scheme, n, k, codes, bits)
        offsets = torch.cat([_offsets(part) for part in parts])
        return PackedWeight(scheme, n, k, codes, bits, _laid_out(offsets).view(torch.int32))

    @staticmethod
    def from_mxfp4(blocks: Tensor, exponents: Tensor) -> PackedWeight:
        """Lay out a weight as files of MXFP4 hold it, bit by bit.

        Args:
            blocks: uint8 [N, K / 2], two fp4 values per byte, the first in the low half.
            exponents: uint8 [N, K / 32] of the scales, 2^(e - 127).

        Raises:
            ValueError: K is no multiple of 32, or an exponent is 255, which stands for NaN.
        """
        n, k = len(blocks), 2 * blocks.shape[1]
        if k % fp4.GROUP or exponents.shape != (n, k // fp4.GROUP):
            raise ValueError(f"{tuple(exponents.shape)} scales do not go with {n} rows of {k} MXFP4 values")
        if bool((exponents > fp4.LARGEST_EXPONENT).any()):
            raise ValueError("a scale of MXFP4 weights is NaN (the exponent 255)")
        codes = from_mxfp4(functional.pad(blocks, (0, 0, 0, -n % LANES)) if n % LANES else blocks)
        return PackedWeight(Scheme(4, fp4.GROUP, code_book=fp4.NAME), n, k, codes, _laid_out(exponents))

    def to_mxfp4(self) -> tuple[Tensor, Tensor]:
        """Return blocks and exponents as `from_mxfp4` takes them, bit by bit; of weights of the code book "fp4"."""
        return to_mxfp4(self.codes)[: self.rows], _rowwise(self.scales)[: self.rows]

    def unpack(self, start: int = 0, stop: int | None = None) -> Affine:
        """Return codes, scales (fp32) and zeros or offsets of rows [start, stop); start a multiple of 16."""
        stop = self.rows if stop is None else min(stop, self.rows)
        part = slice(start // LANES, -(-stop // LANES))
        count, k = stop - start, self.columns
        codes = row_by_row(self.codes[part], self.scheme.bits)
        if self.scheme.code_book:
            codes = fp4.codes((codes + 8).view(torch.uint8))
        scales, zeros, offsets = _rowwise(scale_values(self.scales[part]))[:count], None, None
        if self.offsets is not None:
            offsets = _rowwise(scale_values(self.offsets[part]))[:count]
            if (zeros := self._whole_zeros(scales, offsets)) is not None:
                offsets = None
        return Affine(codes[:count, :k].contiguous(), scales, zeros, self.scheme, offsets)

    @property
    def has_whole_zeros(self) -> bool:
        """Return whether its offsets, if any, are those of zeros that are codes; other programs' need not be."""
        if self.offsets is None:
            return True
        return self._whole_zeros(scale_values(self.scales), scale_values(self.offsets)) is not None

    def _whole_zeros(self, scales: Tensor, offsets: Tensor) -> Tensor | None:
        safe = torch.where(scales == 0, torch.ones_like(scales), scales)
        zeros = (-offsets / safe).round().clamp(self.scheme.lowest, self.scheme.highest)
        return zeros.to(torch.int8) if torch.equal(-scales * zeros, offsets) else None

    def slice(self, start: int, stop: int) -> PackedWeight:
        """Return rows [start, stop) on the same memory.

        Raises:
            ValueError: `start` is not a multiple of 16.
        """
        if start % LANES:
            raise ValueError(f"rows from {start} on cannot be taken out of a packed weight: not a multiple of {LANES}")
        part = slice(start // LANES, -(-stop // LANES))
        offsets = None if self.offsets is None else self.offsets[part]
        return PackedWeight(self.scheme, stop - start, self.columns, self.codes[part], self.scales[part], offsets)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [rows, columns]; for tests, gradients and comparisons: it is as large as the original."""
        return dequantize(self.unpack(), dtype)

    def device_product(self, dtype: torch.dtype, dense: vendor.Product, rows: int = 1) -> vendor.Product | None:
        """Return the fastest kernel for this weight on its device, of torch's and of ours; None where `dense` is.

        Timed once for 1 row, 16 and 32, of which the next counts. While a graph is captured nothing is timed.
        """
        bucket = 1 if rows == 1 else 16 if rows <= 16 else 32
        key = (self.codes.data_ptr(), dtype, bucket)
        if key not in self._chosen:
            ours = self._own_product()
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return ours
            if any(kept[0] != key[0] for kept in list(self._chosen)):
                self._chosen.clear()
            self._chosen[key] = vendor.choose(self.unpack(), dense, dtype, bucket, [ours] if ours else [])
        return self._chosen[key]

    def _own_product(self) -> vendor.Product | None:
        """Return the product by the kernel in Triton, None where there is none."""
        if triton.obstacle(self.codes.device):
            return None
        packed = importlib.import_module("hf_accel.kernels.triton.packed")
        return (lambda x: packed.linear(x, [self])) if packed.is_served(self) else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fields": {}, "_chosen": {}}

    def check(self) -> None:
        """Raise ValueError unless the tensors lie in memory as the kernels take them; they may have been changed."""
        groups = 1 if self.scheme.group_size is None else -(-self.columns // self.scheme.group_size)
        shape = codes_shape(self.rows, self.columns, self.scheme.bits)
        rowwise = (shape[0], groups, LANES)
        kind = torch.int8 if self.scheme.bits == 8 else torch.uint8
        fits = self.codes.dtype is kind and self.codes.shape == shape
        kinds = (torch.uint8,) if self.scheme.code_book else (torch.int16, torch.uint16, torch.int32)
        fits = fits and self.scales.dtype in kinds and self.scales.shape == rowwise
        kept = [self.codes, self.scales]
        if self.offsets is not None:
            kept.append(self.offsets)
            fits = fits and self.offsets.dtype is torch.int32 and self.offsets.shape == rowwise
        if not fits or not all(t.is_contiguous() and t.is_cpu and t.data_ptr() for t in kept):
            raise ValueError("a packed weight's tensors were changed to what its kernels cannot read")

    def matrix(self, bias: Tensor | None = None) -> bytes:
        """The `hfa_matrix` of this weight for C; valid as long as the tensors stay where they are."""
        offsets = self.offsets
        codes, scales = self.codes, self.scales
        # tensors keep their identity when their memory moves (`.data`, `share_memory`, copies of this object), and
        # their address when they are given another layout
        pointers = (
            codes.data_ptr(),
            scales.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        key = (pointers, codes.stride(), codes.shape, codes.dtype, scales.stride(), scales.shape, scales.dtype,
               None if offsets is None else (offsets.stride(), offsets.shape, offsets.dtype),
               None if bias is None else (bias.stride(), bias.shape))  # fmt: skip
        found = self._fields.get(key)
        if found is None:
            self.check()
            if bias is not None and (bias.shape != (self.rows,) or bias.stride() != (1,) or not pointers[3]):
                raise ValueError(f"bias {tuple(bias.shape)} with strides {bias.stride()} is not one row of {self.rows}")
            self._fields.clear()
            found = self._fields[key] = MATRIX.pack(
                pointers[0],
                pointers[3],
                _SCALES[scales.dtype],
                self.rows,
                self.columns,
                pointers[1],
                pointers[2],
                FORMATS[self.scheme.code_book or self.scheme.bits],
                -(-self.columns // QUANTUM) * QUANTUM if self.scheme.group_size is None else self.scheme.group_size,
            )
        return found


def scale_values(bits: Tensor) -> Tensor:
    """Return the fp32 values of the scales or offsets of a packed weight, of which it keeps the bits or exponents."""
    if bits.dtype is torch.uint8:
        return fp4.scales(bits)
    return bits.view(_VALUES[bits.dtype]).float()


def _codes(part: Affine) -> Tensor:
    """Return codes [N, K] interleaved, with N and K padded."""
    n, k = part.codes.shape
    codes = part.codes
    if n % LANES or k % QUANTUM:
        codes = functional.pad(codes, (0, -k % QUANTUM, 0, -n % LANES))
    if part.scheme.code_book:
        codes = fp4.patterns(codes).view(torch.int8) - 8
    return interleaved(codes, part.scheme.bits)


def _offsets(part: Affine) -> Tensor:
    return -part.scales.float() * part.zeros.float() if part.offsets is None else part.offsets  # type: ignore[union-attr]


def _laid_out(values: Tensor) -> Tensor:
    """Return values [N, groups] as [R, groups, 16]."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % LANES))
    return padded.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def _rowwise(values: Tensor) -> Tensor:
    """Return values [R, groups, 16] as [16 R, groups]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])


@runtime_checkable
class PackedProduct(Protocol):
    """A linear product whose weight [N, K] is stored in few bits, in the layout of the native kernels."""

    @property
    def packed(self) -> PackedWeight: ...
