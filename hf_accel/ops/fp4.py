"""The code book of MXFP4: fp4 values of E2M1, of which 32 share a scale that is a power of two.

An fp4 value takes four bits: three say 0, 0.5, 1, 1.5, 2, 3, 4 or 6, the fourth the sign. Its scale takes a byte e and
is 2^(e - 127); 255 is NaN. (OCP Microscaling Formats Specification, version 1.0.) Here its code is the value times two,
a whole number, and the scale half as large.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "fp4"
GROUP = 32
TOP = 12
"""The largest code."""
VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The code of each of the sixteen patterns of four bits."""
LARGEST_EXPONENT = 254
_BIAS = 128  # of exponents, for scales that are half as large
_MANTISSA = 23  # bits of fp32's


def nearest(scaled: Tensor) -> Tensor:
    """Return the nearest codes of fp32 values in units of the scale, as floats; ties go to the even pattern."""
    size = scaled.abs()
    unit = torch.where(size <= 4, 1.0, torch.where(size <= 8, 2.0, 4.0))
    return ((scaled / unit).round_() * unit).clamp_(-TOP, TOP)


def scale_of(largest: Tensor) -> Tensor:
    """Return the scale for groups whose largest magnitudes are these fp32 values, as the specification converts.

    The largest power of two not above the magnitude becomes the largest one that fp4 has, which is 4; so magnitudes
    from 1.75 to 2 times the power, which would round to 8, are clipped to 6.
    """
    exponent = (torch.frexp(largest).exponent + (_BIAS - 4)).clamp_(0, LARGEST_EXPONENT)
    return scales(torch.where(largest > 0, exponent, 0))


def scales(exponents: Tensor) -> Tensor:
    """Return 2^(e - 128) in fp32, the scale of codes, for exponents e from 0 to 254."""
    wide = exponents.to(torch.int32)
    subnormal = (wide + 1) << (_MANTISSA - 2)  # 2^-128 and 2^-127
    return torch.where(wide < 2, subnormal, (wide - 1) << _MANTISSA).view(torch.float32)


def exponents(values: Tensor) -> Tensor:
    """Return the exponents, uint8, of scales of codes.

    Raises:
        ValueError: one is not a power of two from 2^-128 to 2^126.
    """
    bits = values.float().contiguous().view(torch.int32)
    found = torch.where(bits >> _MANTISSA == 0, (bits >> _MANTISSA - 2) - 1, (bits >> _MANTISSA) + 1)
    found = found.clamp(0, LARGEST_EXPONENT)
    if not torch.equal(scales(found).view(torch.int32), bits):
        raise ValueError("a scale of MXFP4 weights is not a power of two from 2^-127 to 2^127")
    return found.to(torch.uint8)


def codes(patterns: Tensor) -> Tensor:
    """Return the codes, int8, of patterns of four bits, uint8."""
    return torch.tensor(VALUES, dtype=torch.int8, device=patterns.device)[patterns.int()]


def patterns(values: Tensor) -> Tensor:
    """Return the patterns of four bits, uint8, of codes, int8; of zero the one without a sign.

    Raises:
        ValueError: one is no fp4 value.
    """
    if values.numel() and max(abs(int(bound)) for bound in values.aminmax()) > TOP:
        raise ValueError(f"a code of MXFP4 weights is beyond {TOP}")
    found = torch.full((2 * TOP + 1,), 255, dtype=torch.uint8)
    found[[value + TOP for value in reversed(VALUES)]] = torch.arange(15, -1, -1, dtype=torch.uint8)
    found[TOP] = 0
    result = found.to(values.device)[values.int() + TOP]
    if bool((result == 255).any()):
        raise ValueError("a code of MXFP4 weights is none of twice 0, 0.5, 1, 1.5, 2, 3, 4 and 6")
    return result
