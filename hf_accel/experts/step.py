"""The native call of one module of stacked experts, and the check at every call that it still stands for the module."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.calls.call import request_in_progress
from hf_accel.core.model.experts import described_experts
from hf_accel.core.model.watching import Watch
from hf_accel.kernels import native
from hf_accel.kernels.weights import dense_matrix


class ExpertsStep:
    """The experts of one module on its own tensors, in whatever layout they lie.

    Weights that were moved or exchanged for others that fit are followed; after any other change the module's own
    implementation runs. counts: int64 [experts], rows sent to each expert in calls of `generate`, by whatever way.
    """

    def __init__(self, module: Any) -> None:
        """Raise ValueError with the reason if the native call cannot stand for `module`."""
        self.most_rows = native.best_expert_rows(module.down_proj.dtype)  # of an expert, on average
        self.counts = torch.zeros(module.down_proj.shape[0], dtype=torch.int64)
        self._request = 0  # the call of `generate` in which everything was looked at
        self._refused: Watch | None = None
        self._build(module)

    def _build(self, module: Any) -> None:
        form = described_experts(module)
        dtype = module.down_proj.dtype
        tensors = [module._parameters[name] for name in module._parameters]
        if dtype not in native.DTYPES or any(t.dtype is not dtype or not t.is_cpu for t in tensors):
            raise ValueError("their tensors do not lie on the CPU in one dtype that has native products")
        if not all(t.is_contiguous() and t.data_ptr() for t in tensors):
            raise ValueError("their tensors do not lie in one piece of memory")

        def matrices(name: str) -> list[bytes]:
            weights = module._parameters[name].detach()
            biases = module._parameters[f"{name}_bias"].detach() if form.biased else [None] * form.experts
            return [dense_matrix(w, b, form.transposed) for w, b in zip(weights, biases, strict=True)]

        kernel = native.NativeExperts(
            dtype=dtype,
            hidden=form.hidden,
            inner=form.inner,
            gate=form.gate,
            interleaved=form.interleaved,
            transposed=form.transposed,
            gate_up=matrices("gate_up_proj"),
            down=matrices("down_proj"),
            counts=self.counts,
        )
        self._watch = Watch(module, list(module.children()))
        self._gate_function = type(module)._apply_gate
        self.form, self.kernel, self.dtype = form, kernel, dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        form = self.form
        return (3 * form.inner * form.hidden + form.biased * (2 * form.inner + form.hidden)) * self.dtype.itemsize

    def output(self, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """Return [T, E] for hidden [T, E], ids and weights [T, k]; None if the native call does not cover this one."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or hidden.dtype is not self.dtype
            or not hidden.is_cpu
            or torch.is_autocast_enabled("cpu")
            or ids.dim() != 2
            or ids.dtype is not torch.int64
            or hidden.dim() != 2
            or weights.shape != ids.shape
            or weights.dtype not in (self.dtype, torch.float32)
            or (self.most_rows is not None and ids.numel() > self.most_rows * self.form.experts)
            or not self._is_current(module)
        ):
            return None
        return self.kernel(hidden, ids, weights, is_counted=request_in_progress() is not None)

    def count(self, ids: Tensor) -> None:
        """Count rows that another implementation serves."""
        if request_in_progress() is None:
            return
        known = ids.detach().flatten().cpu()
        known = known[(known >= 0) & (known < self.counts.numel())]
        self.counts += torch.bincount(known, minlength=self.counts.numel())

    def _is_current(self, module: Any) -> bool:
        """Return whether the call still stands for the module, having followed what may change.

        Within a call of `generate` values of attributes and layouts of tensors are looked at once.
        """
        request = request_in_progress()
        if request is not None and request.number == self._request and self._watch.is_in_place():
            return True
        self._request = 0
        if self._watch.is_hooked():
            return False
        is_same = self._watch.is_same() and type(module)._apply_gate is self._gate_function
        if not is_same and not self._follow(module):
            return False
        if request is not None:
            self._request = request.number
        return True

    def _follow(self, module: Any) -> bool:
        """Describe and build anew after a change; remember what does not fit."""
        if self._refused is not None and self._refused.is_same():
            return False
        before = self.form.experts
        with suppress(ValueError, AttributeError, TypeError, KeyError, RuntimeError):  # then it is refused below
            self._build(module)
            if self.form.experts == before:
                return True
        self._refused = None
        with suppress(RuntimeError):  # tensors without memory are looked at again
            self._refused = Watch(module, list(module.children()))
        return False
