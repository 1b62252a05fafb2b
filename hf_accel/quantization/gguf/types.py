"""The types of GGUF's tensors as packed weights of ours, and back.

Read bit by bit: Q4_0 and Q4_1 (4 bits), Q5_0, Q5_1, Q8_0, IQ4_NL and IQ4_XS (as 8 bits), MXFP4, Q4_K (4 bits) and Q5_K
(as 8 bits): all of these have groups of 32 columns with a scale, or with a scale and an offset in fp32, and only their
sum is rounded where it does not fit 24 bits. Other types that the gguf package dequantizes have smaller groups or
grids of other kinds; they become 8 bits in groups of 32, and `Read.error` says what that changed. Layouts: ggml's
ggml-common.h. Cost: the codes of one block of rows as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.errors import CheckpointError, described
from hf_accel.kernels.weights import LANES, PackedWeight, scale_values
from hf_accel.ops import fp4
from hf_accel.ops.affine import GROUP_SIZES, Affine, Scheme, dequantize, quantize
from hf_accel.quantization.gguf.package import gguf_package
from hf_accel.quantization.gguf.reader import Entry

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GROUP = 32
_SUPER = 256  # columns of a super-block
_ROWS = 1 << 22  # values whose codes are unpacked together

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Codes int8 [rows, K], scales fp32 [rows, K / 32], offsets fp32 or None."""


@dataclass(frozen=True)
class Read:
    """A packed weight, and the largest error of a value relative to the largest of its row; 0: the file's values."""

    weight: PackedWeight
    error: float = 0.0


def packed(entry: Entry, blocks: Tensor) -> Read:
    """Return the weight of a tensor [rows, K] that is not dense, of its bytes [rows, bytes of a row].

    Raises:
        CheckpointError: scales are not finite, or nothing dequantizes the type.
    """
    rows, columns = entry.shape
    if entry.type == "MXFP4":
        return Read(_mxfp4(entry, blocks))
    exact = _EXACT.get(entry.type)
    step = max(LANES, _ROWS // columns // LANES * LANES)
    parts: list[Affine] = []
    error = 0.0
    for start in range(0, rows, step):
        some = blocks[start : start + step]
        if exact is None:
            values = _dequantized(entry, some)
            part = quantize(values, Scheme(8, GROUP))
            largest = values.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            error = max(error, float(((dequantize(part) - values).abs() / largest).max()))
        else:
            codes, scales, offsets = exact.read(some)
            part = Affine(codes, scales, None, Scheme(exact.bits, GROUP, offsets is None), offsets)
        if not all(bool(t.isfinite().all()) for t in (part.scales, part.offsets) if t is not None):
            raise CheckpointError(f"The tensor {entry.name} is damaged: scales of it are NaN or infinite.")
        parts.append(part)
    return Read(PackedWeight.join(_merged(parts)), error)


def _merged(parts: list[Affine]) -> list[Affine]:
    """Return the parts with larger groups where neighbours share a scale and offset, repeated in writing."""
    scheme, columns = parts[0].scheme, parts[0].codes.shape[1]
    for size in (*((columns,) if scheme.bits == 8 else ()), *reversed(GROUP_SIZES[1:])):
        shared = [t.unflatten(1, (-1, size // GROUP)) for part in parts for t in (part.scales, part.offsets)
                  if t is not None and columns % size == 0]  # fmt: skip
        if shared and all(bool((values == values[..., :1]).all()) for values in shared):
            merged = Scheme(scheme.bits, None if size == columns and scheme.bits == 8 else size, scheme.symmetric)
            return [
                Affine(
                    part.codes, part.scales[:, :: size // GROUP], None, merged,
                    None if part.offsets is None else part.offsets[:, :: size // GROUP],
                )
                for part in parts
            ]  # fmt: skip
    return parts


def dense(entry: Entry, blocks: Tensor) -> Tensor:
    """Return the values of a dense tensor, in the mapped file."""
    return blocks.view(DENSE[entry.type]).view(entry.shape)


def _halves(blocks: Tensor, start: int) -> Tensor:
    """Return the fp16 number at a byte of each block, as fp32."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(codes: Tensor) -> Tensor:
    """Return bytes [..., n] as values [..., 2 n], those of the low halves first."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def _q4_0(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 18))
    return _joined(_nibbles(parts[..., 2:]).view(torch.int8) - 8), _halves(parts, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 20))
    return _lowered(_nibbles(parts[..., 4:]), 8, _halves(parts, 0), _halves(parts, 2))


def _fifth_bits(words: Tensor) -> Tensor:
    """Return the fifth bits, uint8 0 or 16 [..., 32], of the words of four bytes of Q5_0 and Q5_1."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((words[..., None] >> shifts & 1) << 4).flatten(-2)


def _q5_0(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 22))
    codes = _nibbles(parts[..., 6:]) | _fifth_bits(parts[..., 2:6])
    return _joined(codes.view(torch.int8) - 16), _halves(parts, 0), None


def _q5_1(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 24))
    codes = _nibbles(parts[..., 8:]) | _fifth_bits(parts[..., 4:8])
    return _lowered(codes, 16, _halves(parts, 0), _halves(parts, 2))


def _q8_0(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 34))
    return _joined(parts[..., 2:].view(torch.int8)), _halves(parts, 0), None


def _iq4_nl(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 18))
    return _joined(_iq4_values(_nibbles(parts[..., 2:]))), _halves(parts, 0), None


def _iq4_xs(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 136))
    high = parts[..., 2:4].contiguous().view(torch.int16)[..., 0].int()  # two bits of each of eight scales
    low = torch.stack((parts[..., 4:8] & 15, parts[..., 4:8] >> 4), dim=-1).flatten(-2).int()
    scales = low | (high[..., None] >> torch.arange(0, 16, 2) & 3) << 4
    codes = _iq4_values(_nibbles(parts[..., 8:].unflatten(-1, (8, 16))))
    return _joined(codes.flatten(-3, -2)), (_halves(parts, 0)[..., None] * (scales - 32).float()).flatten(-2), None


def _iq4_values(patterns: Tensor) -> Tensor:
    return torch.tensor(gguf_package().quants.IQ4_NL.kvalues, dtype=torch.int8)[patterns.int()]


def _scales_of_k(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and offsets, fp32 [..., super-blocks, 8], of Q4_K and Q5_K: 6 bits each, times two of fp16."""
    first, second, third = (parts[..., at : at + 4].int() for at in (4, 8, 12))
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), dim=-1)
    offsets = torch.cat((second & 63, third >> 4 | second >> 2 & 48), dim=-1)
    return _halves(parts, 0)[..., None] * scales.float(), -(_halves(parts, 2)[..., None] * offsets.float())


def _q4_k(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 144))
    scales, offsets = _scales_of_k(parts)
    codes = _nibbles(parts[..., 16:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return _lowered(codes.flatten(-3, -2), 8, scales.flatten(-2), offsets.flatten(-2))


def _q5_k(blocks: Tensor) -> Parts:
    parts = blocks.unflatten(-1, (-1, 176))
    scales, offsets = _scales_of_k(parts)
    codes = _nibbles(parts[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    fifth = parts[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _lowered((codes | fifth << 4).flatten(-3, -2), 16, scales.flatten(-2), offsets.flatten(-2))


def _joined(codes: Tensor) -> Tensor:
    """Return codes [rows, groups, 32] as [rows, K]."""
    return codes.flatten(-2)


def _lowered(codes: Tensor, half: int, scales: Tensor, offsets: Tensor) -> Parts:
    """Return codes from 0 on, uint8 [rows, groups, 32], as ours, `half` lower, with offsets that make up for it."""
    return _joined(codes.view(torch.int8) - half), scales, offsets + half * scales


@dataclass(frozen=True)
class _Exact:
    bits: int
    read: Callable[[Tensor], Parts]


_EXACT = {
    "Q4_0": _Exact(4, _q4_0),
    "Q4_1": _Exact(4, _q4_1),
    "Q5_0": _Exact(8, _q5_0),
    "Q5_1": _Exact(8, _q5_1),
    "Q8_0": _Exact(8, _q8_0),
    "IQ4_NL": _Exact(8, _iq4_nl),
    "IQ4_XS": _Exact(8, _iq4_xs),
    "Q4_K": _Exact(4, _q4_k),
    "Q5_K": _Exact(8, _q5_k),
}


def _mxfp4(entry: Entry, blocks: Tensor) -> PackedWeight:
    parts = blocks.unflatten(-1, (-1, 17))
    values = _nibbles(parts[..., 1:])
    try:
        return PackedWeight.from_mxfp4(
            (values[..., ::2] | values[..., 1::2] << 4).flatten(-2), parts[..., 0].contiguous()
        )
    except ValueError as error:
        raise CheckpointError(f"The tensor {entry.name} is damaged: {error}.") from error


def _dequantized(entry: Entry, blocks: Tensor) -> Tensor:
    package = gguf_package()
    try:
        values = package.quants.dequantize(blocks.contiguous().numpy(), package.GGMLQuantizationType[entry.type])
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"The tensor {entry.name} is of type {entry.type}, which the gguf package does not dequantize "
            f"({described(error)}). Convert the file to another type by llama-quantize."
        ) from error
    return torch.from_numpy(values)


def type_for(weight: PackedWeight) -> str | None:
    """Return the type that holds a packed weight bit by bit, None where none does."""
    if weight.columns % GROUP:
        return None
    if weight.scheme.code_book == fp4.NAME:
        return "MXFP4"
    scales = scale_values(weight.scales)
    if not _fits_half(scales):
        return None
    if weight.offsets is None:
        return "Q8_0" if weight.scheme.bits == 8 else "Q4_0"
    offsets = scale_values(weight.offsets)
    lowest = offsets - 8 * scales
    fits = weight.scheme.bits < 8 and _fits_half(lowest) and torch.equal(lowest + 8 * scales, offsets)
    return "Q4_1" if fits else None


def encoded(weight: PackedWeight, kind: str) -> Tensor:
    """Return the bytes, uint8 [rows, bytes of a row], of a packed weight in the type that `type_for` found."""
    rows, columns = weight.shape
    if kind == "MXFP4":
        pairs, exponents = weight.to_mxfp4()
        values = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).view(rows, -1, 2, GROUP // 2)
        return torch.cat((exponents[..., None], values[..., 0, :] | values[..., 1, :] << 4), dim=-1).flatten(1)
    affine = weight.unpack()
    codes = affine.codes.view(rows, -1, GROUP)
    parts = [_half_bytes(affine.scales, columns)]
    if kind == "Q4_1":
        zeros = torch.zeros_like(affine.scales) if affine.zeros is None else affine.zeros.float()
        offsets = -affine.scales * zeros if affine.offsets is None else affine.offsets
        parts.append(_half_bytes(offsets - 8 * affine.scales, columns))
    parts.append(codes.view(torch.uint8) if kind == "Q8_0" else _paired(codes))
    return torch.cat(parts, dim=-1).flatten(1)


def _fits_half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)


def _half_bytes(values: Tensor, columns: int) -> Tensor:
    """Return values [rows, groups] as the bytes of fp16 numbers per 32 columns, uint8 [rows, columns / 32, 2]."""
    repeated = values.half().repeat_interleave(columns // GROUP // values.shape[1], dim=1)
    return repeated[..., None].contiguous().view(torch.uint8)


def _paired(codes: Tensor) -> Tensor:
    """Return codes of 4 bits and fewer, int8 [rows, groups, 32], as bytes [rows, groups, 16] of Q4_0."""
    above = (codes + 8).view(torch.uint8)
    return above[..., :16] | above[..., 16:] << 4
