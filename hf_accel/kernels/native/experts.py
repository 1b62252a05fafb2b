"""The routed experts of a layer in one native call, for any number of tokens; cost: the distinct experts read once.

Rows are sorted by expert, and threads share out rows of weights, so that neither many experts of few rows nor few of
many leave a thread idle. Where stock materialises a tensor, values are rounded to the dtype at the same point; the sum
over a token's experts is made in fp32.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.block_weights import ACTIVATIONS
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.kernels.weights import MATRIX, dense_matrix

_LAYER = struct.Struct("=7q2d2Q")
_CALL = struct.Struct("=6Q4q")
_get_num_threads = torch.get_num_threads
_empty_like = torch.empty_like


class Gate(NamedTuple):
    """How an expert joins its gate g and its up part u, after g = min(g, limit) and u = clamp(u, -limit, limit).

    activation: act(g) * u, one of silu, gelu_tanh, gelu, relu. alpha: not 0: (u + 1) * g * sigmoid(alpha * g) instead.
    limit: 0: no bounds.
    """

    activation: str
    alpha: float = 0.0
    limit: float = 0.0


class NativeExperts:
    """The experts of one layer, by the addresses of their weights: whoever owns these keeps them where they are.

    counts: int64 [experts], the rows that were sent to each expert since this was built.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        hidden: int,
        inner: int,
        gate: Gate,
        interleaved: bool,
        transposed: bool,
        gate_up: Sequence[bytes],
        down: Sequence[bytes],
        counts: Tensor | None = None,
    ) -> None:
        """Take the `hfa_matrix` of gate_up [2 I, E] and of down [E, I] of every expert.

        transposed: they lie as [E, 2 I] and [I, E]. interleaved: rows of gate and up by turns, not all of gate first.
        counts: what to count in, int64 [experts]; None: zeros of its own.

        Raises:
            RuntimeError: the native library is not available.
        """
        self.dtype, self.hidden, self.experts = dtype, hidden, len(gate_up)
        self.counts = torch.zeros(self.experts, dtype=torch.int64) if counts is None else counts
        self._function: Any = _library.library().hfa_experts_forward
        self._matrices = [ctypes.create_string_buffer(b"".join(matrices), self.experts * MATRIX.size)
                          for matrices in (gate_up, down)]  # fmt: skip
        self._layer = _LAYER.pack(
            DTYPE_CODES[dtype],
            hidden,
            inner,
            self.experts,
            ACTIVATIONS[gate.activation],
            interleaved,
            transposed,
            gate.alpha,
            gate.limit,
            *map(ctypes.addressof, self._matrices),
        )

    def set(self, index: int, gate_up: bytes, down: bytes) -> None:
        """Exchange the weights of one expert for others of the same sizes."""
        for buffer, matrix in zip(self._matrices, (gate_up, down), strict=True):
            ctypes.memmove(ctypes.addressof(buffer) + index * MATRIX.size, matrix, MATRIX.size)

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, *, is_counted: bool = True, sums: Tensor | None = None
    ) -> Tensor:
        """Return [T, E] for hidden [T, E] in the dtype, ids int64 and weights [T, k] in the dtype or fp32; no autograd.

        An id out of range stands for no expert. is_counted: whether rows join `counts`. sums: fp32 [T, E], contiguous:
        what the sums over a token's experts begin with, and where they are left. Experts are summed in the order of
        their ids, so that several calls with some of the experts each, in this order, make the same bits as one.

        Raises:
            ValueError: tensors of other kinds or sizes.
        """
        tokens, choices = ids.shape
        if (
            hidden.shape != (tokens, self.hidden)
            or hidden.dtype is not self.dtype
            or ids.dtype is not torch.int64
            or weights.shape != ids.shape
            or (weights.dtype is not self.dtype and weights.dtype is not torch.float32)
            or not (sums is None or (sums.dtype is torch.float32 and sums.shape == hidden.shape))
        ):
            raise ValueError(
                f"experts of {self.hidden} columns in {self.dtype} take hidden [T, {self.hidden}], ids int64 and "
                f"weights [T, k]; got {hidden.dtype} {tuple(hidden.shape)}, {ids.dtype} {tuple(ids.shape)}, "
                f"{weights.dtype} {tuple(weights.shape)}"
            )
        hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
        out = _empty_like(hidden)
        if not ids.numel():
            return out.zero_()
        call = _CALL.pack(
            hidden.data_ptr(),
            out.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            self.counts.data_ptr() if is_counted else 0,
            0 if sums is None else sums.data_ptr(),
            tokens,
            choices,
            weights.dtype is torch.float32,
            _get_num_threads(),
        )
        if self._function(self._layer, call):
            raise ValueError(f"native experts do not take {tokens} tokens with {choices} experts each")
        return out


def best_expert_rows(dtype: torch.dtype) -> int | None:
    """Return up to how many rows per expert dense experts are computed here rather than by ATen; None: any number.

    A trial shows it, once per process: up to 100 ms.
    """
    return _best_expert_rows(dtype, _library.status().isa)


_TRIED_ROWS = (8, 16, 32, 64)  # of an expert, in the trial


@functools.cache
def _best_expert_rows(dtype: torch.dtype, isa: str) -> int | None:
    experts, hidden, inner = 4, 512, 512
    gate_up, down = (torch.full((experts, *size), 0.01, dtype=dtype) for size in ((2 * inner, hidden), (hidden, inner)))
    matrices = [[dense_matrix(weight) for weight in weights] for weights in (gate_up, down)]
    native = NativeExperts(
        dtype=dtype, hidden=hidden, inner=inner, gate=Gate("silu"), interleaved=False, transposed=False,
        gate_up=matrices[0], down=matrices[1],
    )  # fmt: skip

    def ours(x: Tensor) -> None:
        ids = torch.arange(len(x))[:, None] % experts
        native(x, ids, torch.ones(ids.shape, dtype=dtype))

    def atens(x: Tensor) -> None:
        for i, part in enumerate(x.chunk(experts)):
            gate, up = functional.linear(part, gate_up[i]).chunk(2, dim=-1)
            functional.linear(functional.silu(gate) * up, down[i])

    def seconds(compute: Callable[[Tensor], None], x: Tensor) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            compute(x)
            best = min(best, time.perf_counter() - start)
        return best

    best = _TRIED_ROWS[0] // 2
    for rows in _TRIED_ROWS:
        x = torch.ones(experts * rows, hidden, dtype=dtype)
        ratio = seconds(ours, x) / seconds(atens, x)
        if ratio > 1.0:
            return best
        best = rows
    return None if ratio < 0.8 else best
