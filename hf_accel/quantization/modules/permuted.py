"""A packed product whose groups are not of adjacent columns: it gathers its input in the order of its codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.quantization.modules.linear import QuantizedLinear, SealedWeight


class PermutedWeight(SealedWeight):
    """Stands in for the `weight` of such a product, with the columns where the model has them."""

    def __init__(self, product: QuantizedLinear, order: Tensor) -> None:
        super().__init__(product.packed, product.dtype)
        self.order = order

    def dequantize(self) -> Tensor:
        """Return the values the codes stand for: a new tensor as large as the original weight."""
        return super().dequantize()[:, torch.argsort(self.order)]


class PermutedLinear(nn.Linear):
    """y = x[..., order] V^T + bias for x [..., K], with V [N, K] packed: column i of V is column order[i] of W.

    It holds no packed weight itself and is not of the exact class `nn.Linear`, so whole-layer kernels leave its layer
    to the model's own modules. Cost beyond the product: one gather of the input.
    """

    order: Tensor

    def __init__(self, product: QuantizedLinear, order: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = product.in_features, product.out_features
        self.inner = product
        self.register_buffer("order", order)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> PermutedWeight:  # type: ignore[override]
        return PermutedWeight(self.inner, self.order)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError(f"this product takes {self.in_features} columns, the input has {input.shape[-1]}")
        product: Tensor = self.inner(input.index_select(-1, self.order))
        bias: Any = self.bias
        return product if bias is None else product + bias.to(product.dtype)
