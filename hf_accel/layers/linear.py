"""Products by the native library: decoding is reading weights, and ATen's product reads them slowly.

A product of 1 to 16 rows with an [N, K] weight reads N·K elements once and does 2·N·K operations per row: far below
the arithmetic a core can do, so its time is the weight's bytes over the memory bandwidth. More rows go to ATen's GEMM,
but in bf16 and fp16 on CPUs without instructions for them, where ATen has no fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Linear, Parameter, functional
from transformers.pytorch_utils import Conv1D

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import Skip
from hf_accel.core.config import Config
from hf_accel.core.journal import beneath, subclass
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.kernels import native

ANY_ROWS = 2**40  # more than memory holds
# where one of these has been replaced since, the replacement is to run
_FORWARDS = (Linear.forward, Conv1D.forward, functional.linear)


def _is_stock() -> bool:
    """Return whether products are what they were when this was imported: no class or function was patched since."""
    return (Linear.forward, Conv1D.forward, functional.linear) == _FORWARDS


@dataclass(frozen=True, kw_only=True)
class NativeLinearConfig(Config):
    """Products by the native CPU library, on the weights as they lie in memory.

    max_rows: products of up to this many rows (batch x query tokens) go to the library, the others to ATen. None: 16,
        or any number where a short trial shows that ATen's are slower (bf16 and fp16 on CPUs without instructions for
        them). Weights that are stored transposed (Conv1D) go up to 32 rows at most.
    """

    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            self.check_integer("max_rows", 1)


class NativeLinearPatcher(Patcher[NativeLinearConfig], config=NativeLinearConfig):
    stage = Stage.PRODUCTS
    fidelity = Fidelity.EXACT
    occupies = "linear products"
    is_preferred = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        if setting.anatomy.products():
            return Offer([NativeLinearConfig()])
        return Offer(
            skipped=[Skip(NativeLinearConfig.__name__, "all products are packed, and run natively as they are")]
        )

    def obstacles(self, setting: Setting) -> list[str]:
        return native_obstacles(setting.anatomy)

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy = setting.anatomy
        most = self.config.max_rows or native.best_rows(anatomy.dtype) or ANY_ROWS
        classes: dict[type, type] = {}
        count = 0
        others: set[str] = set()
        for module in anatomy.products():
            if not _fits(module):
                others.add(str(module.weight.dtype).removeprefix("torch."))  # type: ignore[union-attr]
                continue
            original = type(module)
            if original not in classes:
                is_transposed = original is Conv1D
                rows = min(most, native.FEW_ROWS if self.config.max_rows is None else native.MAX_ROWS)
                limit = rows if is_transposed else most
                forward = native_forward(limit, is_transposed)
                classes[original] = subclass(NativeProduct, original, max_rows=limit, forward=forward)
            host.journal.swap_class(module, classes[original])
            count += 1
        skipped = tuple(
            f"products of {dtype} weights or weights off the CPU stay with ATen" for dtype in sorted(others)
        )
        limits = sorted({made.max_rows for made in classes.values()} or {most})  # type: ignore[attr-defined]
        extent = " or ".join("any number of" if limit == ANY_ROWS else f"up to {limit}" for limit in limits)
        return Change(f"{count} products of {extent} rows run natively ({native.status().isa})", 0, skipped)


def native_obstacles(anatomy: Anatomy) -> list[str]:
    """Return why the native library cannot serve this model."""
    found = native.obstacles(anatomy.device)
    if anatomy.dtype not in native.DTYPES:
        found.append(f"the native library has no {anatomy.dtype} products.")
    return found


def _fits(module: Any) -> bool:
    weight, bias = module.weight, module.bias
    return (
        type(weight) is Parameter  # others (quantized, distributed) hold no plain memory
        and weight.device.type == "cpu"
        and weight.dtype in native.DTYPES
        and weight.dim() == 2
        and weight.stride(1) == 1
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
    )


class NativeProduct:
    """Marks products whose `forward` is a `native_forward`; all else is as the class it is mixed over does."""

    max_rows: int


def native_forward(max_rows: int, transposed: bool) -> Callable[..., torch.Tensor]:
    """Return the `forward` of a product: up to max_rows rows natively.

    Both are bound here and not read from the module, whose class another thread may put back while this runs.
    """

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if input.numel() > max_rows * input.shape[-1]:  # first, so that prompts pay for no other check
            return beneath(NativeProduct, self, "forward")(input)  # type: ignore[no-any-return]
        parameters = self._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if (
            type(weight) is not Parameter
            or type(input) is not torch.Tensor
            or input.dtype is not weight.dtype
            or input.dtype not in native.DTYPES
            or not input.numel()
            or not weight.is_cpu
            or not input.is_cpu
            or torch.is_grad_enabled()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
            or not _is_stock()
            or weight.dim() != 2
            or weight.stride(1) != 1
            or input.shape[-1] != weight.shape[0 if transposed else 1]
            or not weight.data_ptr()  # its memory has been freed: stock's forward says so
            or (bias is not None and not _bias_fits(bias, weight, transposed))
        ):
            return beneath(NativeProduct, self, "forward")(input)  # type: ignore[no-any-return]
        return native.linear(input, weight, bias, transposed=transposed)

    return forward


def _bias_fits(bias: torch.Tensor, weight: torch.Tensor, transposed: bool) -> bool:
    """Return whether a bias, which may have been exchanged, is one plain row of memory for the product."""
    return (
        type(bias) is Parameter
        and bias.dtype is weight.dtype
        and bias.is_cpu
        and bias.shape == weight.shape[1 if transposed else 0 :][:1]
        and bias.is_contiguous()
        and bias.data_ptr() != 0
    )
