"""Products with weights of 8, 4, 3 and 2 bits and of MXFP4, wherever they lie.

On the CPU with the native library the codes are multiplied as they are: activations are rounded to 16 bits for 8-bit
weights, to 8 bits for weights of fewer bits, in blocks of 32 columns with a scale each. Elsewhere kernels in Triton or
torch's own multiply, whichever is faster (`vendor`), or a block of rows at a time is dequantized into the dtype of the
activations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels import native
from hf_accel.kernels.weights import LANES, PackedWeight
from hf_accel.ops.affine import dequantize

MOST_ROWS = 32  # above, a matrix-matrix product on the dequantized weight is the better tool
_BLOCK_BYTES = 8 << 20  # of a dequantized block of rows


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [..., K]; bias [N] in the dtype of x. No autograd."""
    if x.is_cpu and native.is_available() and x.dtype in native.DTYPES and x.numel():
        return native.packed_linear(x, weight.matrix(bias), weight.rows)
    if not x.is_cpu and 0 < x.numel() <= MOST_ROWS * weight.columns:
        rows = x.numel() // weight.columns
        product = weight.device_product(x.dtype, lambda x: dequantized_linear(x, weight), rows)
        if product is not None:
            # of a prompt's last tokens rows lie apart
            y = product(x.reshape(-1, weight.columns).contiguous()).reshape(*x.shape[:-1], weight.rows)
            return y if bias is None else y + bias
    return dequantized_linear(x, weight, bias)


def dequantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The same with rows of the weight dequantized block by block and nothing rounded: any device, any dtype."""
    step = max(LANES, _BLOCK_BYTES // (weight.columns * x.element_size()) // LANES * LANES)
    if step >= weight.rows:
        return functional.linear(x, weight.dequantize(x.dtype), bias)
    parts = [
        functional.linear(x, dequantize(weight.unpack(start, start + step), x.dtype))
        for start in range(0, weight.rows, step)
    ]
    product = torch.cat(parts, dim=-1)
    return product if bias is None else product + bias
