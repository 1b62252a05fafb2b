"""Products with weights of 8 to 2 bits by the native library, for any number of rows; cost: one read of the codes.

Sums are exact integers per block of 32 columns, then fp32: a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.linear import DTYPE_CODES

_get_num_threads = torch.get_num_threads
_function: Any = None


def packed_linear(x: Tensor, matrix: bytes, rows: int) -> Tensor:
    """x W^T + bias [..., rows] for the `hfa_matrix` `matrix` (see kernels/weights.py), whose bias has the dtype of x.

    Raises: ValueError for sizes the library does not serve.
    """
    global _function
    if _function is None:
        _function = _library.library().hfa_packed_linear
    if not x.is_contiguous():
        x = x.contiguous()
    shape = x.shape
    y = x.new_empty((*shape[:-1], rows))
    if _function(
        x.data_ptr(), matrix, y.data_ptr(), x.numel() // shape[-1], DTYPE_CODES[x.dtype] | _get_num_threads() << 16
    ):
        raise ValueError(f"native packed_linear does not take x {tuple(shape)} for a weight of {rows} rows")
    return y
