"""Methods that round a weight to few bits, by name. Each is one file with one function of the same arguments."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.observing import Moment
from hf_accel.quantization.rounding.nearest import nearest


class Rounding(Protocol):
    """Chooses codes, scales and zeros of a weight [N, K] in `scheme`, for what the product reads.

    observed: the second moment of its inputs on calibration text; None where the method asks for none.
    scale_dtype: scales are values of it, as they are stored in it.
    """

    def __call__(self, weight: Tensor, scheme: Scheme, observed: Moment | None, scale_dtype: torch.dtype) -> Affine: ...


METHODS: dict[str, Rounding] = {"nearest": nearest}
