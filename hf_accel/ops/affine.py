"""Affine quantization of weights, W = (code - zero) * scale, per output channel or per group of columns.

Codes are whole numbers next to one another, or those of a code book (`fp4`), which lie further apart where they are
large.

At 4 bits scales are chosen by squared error among a few candidates instead of from the largest value alone (as in
llama.cpp's quantize_row_q4_0, whose choice is one of them); cost: one pass over the weight per candidate, one block of
rows at a time, so that a few megabytes are all the memory it takes. At 2 and 3 bits the value of largest magnitude is
the lowest code and nothing is searched: scales of least squared error clip, which shrinks every weight of a group the
same way, and raised the KL divergence of a trained model at 2 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.ops import fp4

GROUP_SIZES = (32, 64, 128)
_BLOCK = 1 << 19  # elements that are quantized together: temporaries stay in the cache
# scale candidates of a group: its largest value over these. A negative one makes that value code -8 or -7.6, so that
# all sixteen codes are used. Candidates that clip the largest value (-8.8, 8.3) lower the squared error further, and
# raised the KL divergence of a small trained model (0.0904 against 0.0862), so they are not tried.
_SYMMETRIC_4 = (-8.0, -7.6, 7.5)
_ASYMMETRIC_4 = (1.0, 0.95, 0.9, 0.85)  # of the range from smallest to largest value


@dataclass(frozen=True)
class Scheme:
    """Bits per weight (2, 3, 4 or 8), columns that share a scale (None: the whole row), and whether zero is the code 0.

    Codes are whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1. Scales may be negative. With a code book codes and
    scales are what it says: "fp4" are MXFP4's, in 4 bits and symmetric groups of 32.

    Raises:
        ValueError: the code book is not known, or goes with other bits or groups.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    code_book: str | None = None

    def __post_init__(self) -> None:
        found = (self.code_book, self.bits, self.group_size, self.symmetric)
        if self.code_book is not None and found != (fp4.NAME, 4, fp4.GROUP, True):
            raise ValueError(f"the code book {fp4.NAME!r} goes with 4 bits and symmetric groups of 32, not {found}")

    @property
    def lowest(self) -> int:
        return -fp4.TOP if self.code_book else -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        return fp4.TOP if self.code_book else (1 << self.bits - 1) - 1

    def columns_per_scale(self, columns: int) -> int:
        return columns if self.group_size is None else self.group_size

    def bits_per_weight(self, columns: int, scale_bytes: int = 2) -> float:
        """Bits that a weight takes, its share of the scale (and zero) included; scales of MXFP4 take a byte."""
        shared = (1 if self.code_book else scale_bytes) * 8 + (0 if self.symmetric else 32)
        return self.bits + shared / self.columns_per_scale(columns)


@dataclass(frozen=True)
class Affine:
    """A quantized matrix: codes int8 [N, K]; scales float [N, groups]; zeros int8 [N, groups], None if symmetric.

    offsets: fp32 [N, groups] in place of zeros, W = code * scale + offset, for what has no whole zeros.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    offsets: Tensor | None = None

    @property
    def is_symmetric(self) -> bool:
        return self.zeros is None and self.offsets is None


def quantize(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Affine:
    """Quantize weight [N, K] (any float dtype, finite); scales hold values of `scale_dtype`, or powers of two (MXFP4).

    Raises:
        ValueError: the group size does not divide K, or a value is not finite.
    """
    n, k = weight.shape
    group = scheme.columns_per_scale(k)
    if k % group:
        raise ValueError(f"groups of {group} do not divide {k} columns")
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    if scheme.code_book:
        scale_dtype = torch.float32
    scales = torch.empty(n, k // group, dtype=scale_dtype, device=weight.device)
    zeros = None if scheme.symmetric else torch.empty(n, k // group, dtype=torch.int8, device=weight.device)
    step = max(1, _BLOCK // k)
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        grouped = weight[rows].detach().float().reshape(-1, k // group, group)
        if not bool(torch.isfinite(torch.stack(grouped.aminmax())).all()):
            raise ValueError("a weight is NaN or infinite")
        some_codes, some_scales, some_zeros = quantize_groups(grouped, scheme, scale_dtype)
        codes[rows] = some_codes.reshape(-1, k).to(torch.int8)
        scales[rows] = some_scales.squeeze(-1).to(scale_dtype)
        if zeros is not None and some_zeros is not None:
            zeros[rows] = some_zeros.squeeze(-1).to(torch.int8)
    return Affine(codes, scales, zeros, scheme)


def quantize_groups(w: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes, scales and zeros as floats for fp32 groups w [n, groups, group]; one scale, one zero per group."""
    low, high = scheme.lowest, scheme.highest
    smallest, largest = w.aminmax(dim=-1, keepdim=True)
    if not scheme.symmetric:
        smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scales = _scale_candidates(smallest, largest, scheme)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    least: Tensor | None = None
    for scale in scales:
        scale = scale.to(dtype).float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a group of zeros has the codes 0
        zero = None if scheme.symmetric else (low - smallest / scale).round_().clamp_(low, high)
        codes = encode(w, scale, zero, scheme)
        if len(scales) == 1:
            return codes, scale, zero
        found = codes if zero is None else codes - zero
        error = torch.addcmul(w, found, scale, value=-1).square_().sum(dim=-1, keepdim=True)
        if best is None or least is None:
            best, least = (codes, scale, zero), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better, codes, best[0]),
            torch.where(better, scale, best[1]),
            None if zero is None or best[2] is None else torch.where(better, zero, best[2]),
        )
    return best  # type: ignore[return-value]


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the codes of fp32 values as floats, by scales and zeros that broadcast over them."""
    if scheme.code_book:
        return fp4.nearest(w / scale)
    codes = (w / scale).round_()
    return (codes if zero is None else codes.add_(zero)).clamp_(scheme.lowest, scheme.highest)


def _scale_candidates(smallest: Tensor, largest: Tensor, scheme: Scheme) -> list[Tensor]:
    """Return the scales to try for groups with these extreme values."""
    if not scheme.symmetric:
        factors: tuple[float, ...] = _ASYMMETRIC_4 if scheme.bits == 4 else (1.0,)
        return [(largest - smallest) * (factor / (scheme.highest - scheme.lowest)) for factor in factors]
    extreme = torch.where(largest >= -smallest, largest, smallest)
    if scheme.code_book:
        return [fp4.scale_of(extreme.abs())]
    if scheme.bits == 8:
        return [extreme.abs() / scheme.highest]
    factors = _SYMMETRIC_4 if scheme.bits == 4 else (scheme.lowest,)
    return [extreme / factor if factor < 0 else extreme.abs() / factor for factor in factors]


def dequantize(quantized: Affine, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [N, K] that the codes stand for, computed in fp32."""
    n, k = quantized.codes.shape
    groups = quantized.scales.shape[1]
    codes = quantized.codes.reshape(n, groups, k // groups).float()
    if quantized.zeros is not None:
        codes = codes - quantized.zeros[..., None].float()
    values = codes * quantized.scales[..., None].float()
    if quantized.offsets is not None:
        values = values + quantized.offsets[..., None]
    return values.reshape(n, k).to(dtype)
