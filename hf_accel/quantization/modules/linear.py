"""A linear product whose weight is stored in 8 bits or fewer, in the place of an `nn.Linear` or GPT-2's `Conv1D`.

It is a module like any other: it moves, copies, pickles and lists its state. It has no floating-point weight, and who
asks for `.weight` gets its shape, dtype and device, but no values to change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_accel.errors import UnsupportedModelError
from hf_accel.kernels import pages
from hf_accel.kernels.packed import dequantized_linear, packed_linear
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme


class SealedWeight:
    """Stands in for the `weight` of a packed product, with the shape, dtype and device that the weight had.

    Libraries read shape, dtype and device of a weight to build adapters. Some architectures compute with a weight
    themselves: they get its values, made anew each time. Changing the values (merging an adapter, resizing a
    vocabulary) is refused with the reason.
    """

    requires_grad = False
    _is_hf_initialized = True  # transformers initialises no weight that says so

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        self._packed = packed
        self.shape = torch.Size((packed.rows, packed.columns))
        self.dtype = dtype
        self.device = packed.codes.device

    @property
    def ndim(self) -> int:
        return 2

    def dim(self) -> int:
        return 2

    def size(self, index: int | None = None) -> Any:
        return self.shape if index is None else self.shape[index]

    def numel(self) -> int:
        return self.shape.numel()

    def dequantize(self) -> Tensor:
        """Return the values the codes stand for: a new tensor as large as the original weight."""
        return self._packed.dequantize(self.dtype)

    @property
    def data(self) -> SealedWeight:
        return self

    @data.setter
    def data(self, value: Any) -> None:
        raise self._unchangeable()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = (arguments, options or {})
        if getattr(function, "__name__", "").endswith("_"):
            raise next(value for value in tree_leaves(given) if isinstance(value, SealedWeight))._unchangeable()
        arguments, options = tree_map_only(SealedWeight, SealedWeight.dequantize, given)
        return function(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise self._unchangeable()
        return getattr(self.dequantize(), name)

    def __matmul__(self, other: Any) -> Tensor:
        return self.dequantize() @ other

    def __getitem__(self, index: Any) -> Tensor:
        return self.dequantize()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._unchangeable()

    def __iadd__(self, value: Any) -> SealedWeight:
        raise self._unchangeable()

    __isub__ = __imul__ = __itruediv__ = __iadd__

    def _unchangeable(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"This weight of shape {tuple(self.shape)} is stored in {self._packed.scheme.bits} bits; an adapter cannot "
            "be merged into it, nor its values be changed, without rounding them once more. Keep the adapter beside "
            "it, or hf_accel.restore(model) first and change the original weights."
        )


class _PackedLinear(torch.autograd.Function):
    """The product with a gradient for its input and none for its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return module.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.module.packed.dequantize(gradient.dtype), None


class QuantizedLinear(nn.Linear):
    """y = x W^T + bias for x [..., K], with W [N, K] packed in 8 to 2 bits or MXFP4 (see kernels/weights.py).

    A subclass of `nn.Linear` so that adapters find it; `nn.Linear.__init__` is not run, as there is no weight.
    integer_rows: products of more rows than this are computed on dequantized blocks of the weight instead of on the
    codes, where that was measured to be faster; None: never.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.scheme = packed.scheme
        self.dtype = dtype
        self.integer_rows: int | None = None
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("offsets", packed.offsets)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._packed = packed
        pages.settle(packed.codes, packed.scales, packed.offsets)

    @property
    def packed(self) -> PackedWeight:
        """Return the weight on the buffers as they are now: they may have been moved or exchanged."""
        buffers, packed = self._buffers, self._packed
        if (
            buffers["codes"] is not packed.codes
            or buffers["scales"] is not packed.scales
            or buffers["offsets"] is not packed.offsets
        ):
            packed = self._packed = PackedWeight(
                self.scheme, self.out_features, self.in_features,
                self.codes, self.scales, self.offsets,
            )  # fmt: skip
        return packed

    @property
    def weight(self) -> SealedWeight:  # type: ignore[override]
        return SealedWeight(self.packed, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = PackedWeight(
            self.scheme, self.out_features, self.in_features, self.codes, self.scales, self.offsets
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and offsets."""
        return self.packed.nbytes

    def product(self, x: Tensor) -> Tensor:
        """Return the product, without autograd."""
        bias = self._parameters["bias"]
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)  # type: ignore[assignment]
        if self.integer_rows is not None and x.numel() > self.integer_rows * x.shape[-1]:
            return dequantized_linear(x, self.packed, bias)
        return packed_linear(x, self.packed, bias)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError(f"this product takes {self.in_features} columns, the input has {input.shape[-1]}")
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if torch.is_grad_enabled() and input.requires_grad:
            return _PackedLinear.apply(input, self)  # type: ignore[no-any-return]
        return self.product(input)

    def extra_repr(self) -> str:
        group = f"group_size={self.scheme.group_size}" if self.scheme.group_size else "per channel"
        group += f", code_book={self.scheme.code_book!r}" if self.scheme.code_book else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.scheme.bits}, {group}"
        )


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of an `nn.Linear` or `Conv1D` as [N, K]."""
    weight: Any = module.weight
    return weight if isinstance(module, nn.Linear) else weight.T


__all__ = ["QuantizedLinear", "Scheme", "SealedWeight", "linear_weight"]
