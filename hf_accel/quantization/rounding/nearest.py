"""Rounding to nearest: every value gets the code next to it, by the scale of its group with the least squared error.

It looks at the weight alone and needs no text. Cost: a pass over the weight for each candidate of a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme, quantize
from hf_accel.quantization.observing import Moment


def nearest(weight: Tensor, scheme: Scheme, observed: Moment | None, scale_dtype: torch.dtype) -> Affine:
    """Round each value of a weight to nearest; what the product reads (`observed`) makes no difference.

    Raises:
        ValueError: the group size does not divide the columns, or a value is not finite.
    """
    return quantize(weight, scheme, scale_dtype)
