"""One token of a recurrent mixer in one native call: what stands between its projections; cost: its states read and
written once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.linear import DTYPE_CODES, DTYPES
from hf_accel.ops.recurrent import GatedNorm

KINDS = ("conv", "delta", "ssd", "scan")
"""In the order of `enum hfa_mix`, which says what each computes."""

MOST_SOURCES = 6
_MIXER = struct.Struct("=16q2d6Q35q")
_CALL = struct.Struct("=6Q6q4Q2q")
_get_num_threads = torch.get_num_threads


@dataclass(frozen=True)
class Span:
    """`count` values of a row of the source with this number, in chunks `stride` apart; chunk 0: they are one piece."""

    source: int
    start: int
    count: int
    chunk: int = 0
    stride: int = 0

    def packed(self) -> tuple[int, ...]:
        return self.source, self.start, self.chunk or max(self.count, 1), self.stride, self.count

    @property
    def stop(self) -> int:
        """The place after the last value."""
        _, start, chunk, stride, count = self.packed()
        last = count - 1
        return start + last // chunk * stride + last % chunk + 1 if count else 0


_NONE = Span(0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """What a mixer does for one token, as `hfa_mixer` in native.h says it.

    parts: the channels of the convolution, one after the other; of a scan x, B and C. before: what they are multiplied
    by before it. norm: None where there is none.
    """

    kind: str
    parts: tuple[Span, ...]
    channels: int = 0
    taps: int = 0
    is_silu: bool = False
    heads: int = 0
    groups: int = 0
    key_dim: int = 0
    value_dim: int = 0
    norm: GatedNorm | None = None
    beta_scale: float = 1.0
    before: Span = _NONE
    gate: Span = _NONE
    rate: Span = _NONE
    beta: Span = _NONE

    @property
    def width(self) -> int:
        """Values of a row of the result."""
        if self.kind in ("conv", "scan"):
            return self.channels if self.kind == "conv" else self.heads
        return self.heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class MixerWeights:
    """conv [channels, 1, taps], conv_bias [channels]; a_log [H], or [H, N] of a scan; dt_bias, d [H]; norm [n]."""

    conv: Tensor | None = None
    conv_bias: Tensor | None = None
    a_log: Tensor | None = None
    dt_bias: Tensor | None = None
    d: Tensor | None = None
    norm: Tensor | None = None

    def all(self) -> tuple[Tensor | None, ...]:
        return self.conv, self.conv_bias, self.a_log, self.dt_bias, self.d, self.norm


class NativeMixer:
    """One mixer's step; holds its tensors, and their addresses as C wants them.

    dtype: of what it reads and returns. Raises: ValueError naming what does not fit; RuntimeError where the native
    library is not available.
    """

    def __init__(self, shape: MixerShape, weights: MixerWeights, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"a native mixer is of bf16, fp16 or fp32; got {dtype}")
        self.shape, self.weights, self.dtype = shape, weights, dtype
        self._check()
        self._function: Any = _library.library().hfa_mixer_step
        norm = shape.norm or GatedNorm(0, 0.0)
        spans = [*shape.parts, *[_NONE] * (3 - len(shape.parts)), shape.before, shape.gate, shape.rate, shape.beta]
        used = 1 + max(span.source for span in spans)
        self._widths = [max(span.stop for span in spans if span.source == index) for index in range(used)]
        self._mixer = _MIXER.pack(
            KINDS.index(shape.kind),
            DTYPE_CODES[dtype],
            shape.channels,
            shape.taps,
            shape.is_silu,
            shape.heads,
            shape.groups,
            shape.key_dim,
            shape.value_dim,
            norm.size,
            0 if weights.norm is None else weights.norm.numel(),
            norm.gates_first,
            norm.rounds_once,
            norm.is_sigmoid,
            _is_f32(weights.a_log),
            _is_f32(weights.dt_bias),
            norm.eps,
            shape.beta_scale,
            *[0 if tensor is None else tensor.data_ptr() for tensor in weights.all()],
            *[number for span in spans for number in span.packed()],
        )

    def _check(self) -> None:
        shape, weights = self.shape, self.weights
        heads = (shape.heads, shape.key_dim) if shape.kind == "scan" else (shape.heads,)
        sizes = {
            "conv": (shape.channels, 1, shape.taps),
            "conv_bias": (shape.channels,),
            "a_log": heads,
            "dt_bias": heads[:1],
            "d": heads[:1],
        }
        for name, tensor in vars(weights).items():
            if tensor is None:
                continue
            may_be_f32 = name == "a_log" or (name == "dt_bias" and shape.kind == "delta")
            fits = tensor.dtype is self.dtype or (may_be_f32 and tensor.dtype is torch.float32)
            if not fits or not tensor.is_cpu or not tensor.is_contiguous() or not tensor.data_ptr():
                raise ValueError(f"its {name} does not lie in one piece of main memory in {self.dtype}")
            if name in sizes and tuple(tensor.shape) != sizes[name]:
                raise ValueError(f"its {name} is {list(tensor.shape)} and not {list(sizes[name])}")
        if shape.norm is not None and (weights.norm is None or weights.norm.numel() % shape.norm.size):
            raise ValueError("its norm has no weight that fits")

    def __call__(
        self,
        sources: Sequence[Tensor],
        conv_state: Tensor | None = None,
        state: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> Tensor | None:
        """Return [B, 1, width] for sources [B, 1, n] and move the states, which are written in place.

        conv_state: [B, channels, taps]; state: fp32 [B, H, ...]; decay: fp32 [B, 1, H, K], logarithms per key. None,
        with nothing written: dtypes, layouts or sizes do not fit, or memory is short.
        """
        batch = sources[0].shape[0]
        shape = self.shape
        conv_shape = None if shape.kind == "scan" else (batch, shape.channels, shape.taps)
        if (
            len(sources) != len(self._widths)
            or any(x.dtype is not self.dtype or x.shape[:2] != (batch, 1) or x.stride(-1) != 1 for x in sources)
            or any(x.shape[-1] < width for x, width in zip(sources, self._widths, strict=True))
            or not _is_state(conv_state, conv_shape, self.dtype)
            or not _is_state(state, None if shape.kind == "conv" else self.state_shape(batch), torch.float32)
            or (decay is not None and not _is_state(decay, (batch, 1, shape.heads, shape.key_dim), torch.float32))
        ):
            return None
        spare = MOST_SOURCES - len(sources)
        out = sources[0].new_empty((batch, 1, shape.width))
        status = self._function(
            self._mixer,
            _CALL.pack(
                *[x.data_ptr() for x in sources],
                *(0,) * spare,
                *[x.stride(0) for x in sources],
                *(0,) * spare,
                0 if decay is None else decay.data_ptr(),
                0 if conv_state is None else conv_state.data_ptr(),
                0 if state is None else state.data_ptr(),
                out.data_ptr(),
                batch,
                _get_num_threads(),
            ),
        )
        return None if status else out

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of the recurrent state of so many sequences."""
        shape = self.shape
        if shape.kind == "scan":
            return batch, shape.heads, shape.key_dim
        sides = (shape.key_dim, shape.value_dim)
        return (batch, shape.heads, *(sides if shape.kind == "delta" else reversed(sides)))


def _is_f32(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype is torch.float32


def _is_state(state: Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype) -> bool:
    if state is None or shape is None:
        return state is None and shape is None
    return state.shape == shape and state.dtype is dtype and state.is_contiguous() and state.data_ptr() != 0
