"""What a step of a whole decoder is made of beside its layers, and the memory that it runs in."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native.block_weights import Norm, Projection
from hf_accel.kernels.weights import FORMATS

_FIELDS = 32  # of hfa_block_call, 8 bytes each
_KEYS, _VALUES, _PAST, _FIRST, _STRIDES, _FORMAT, _ROWS = 4, 5, 9, 10, 17, 27, 30


@dataclass(frozen=True, kw_only=True)
class StepEnds:
    """What stands before and after the layers.

    embedding [V, E], times `scale`; positions [P, E] or None, of which row position + offset is added; norm: of the
    last layer's result; head [V', E]; logits times `logit_scale`, then capped at `softcap` by tanh where it is not 0.
    """

    embedding: Tensor
    scale: float
    positions: Tensor | None
    offset: int
    norm: Norm | None
    head: Projection
    logit_scale: float = 1.0
    softcap: float = 0.0


class StepMemory:
    """What steps of R sequences write to: the addresses in their cache, rows, the logits and the choices [R, 1]."""

    def __init__(self, layers: int, hidden: int, rows: int = 1) -> None:
        self.rows, self.positions = rows, array("q", bytes(8 * rows))
        self.layers = array("q", bytes(8 * _FIELDS * layers))
        self.keys: list[Any] = [None] * layers
        self.values: list[Any] = [None] * layers
        self.places: list[Any] = [None] * layers
        self.row = torch.empty(rows * hidden, dtype=torch.float32)  # of the dtype in fact, which takes no more
        self.room = torch.empty(2 * hidden + 32, dtype=torch.float32)
        self.choice = torch.zeros((rows, 1), dtype=torch.int64)
        self.call = array("q", [self.layers.buffer_info()[0], self.row.data_ptr(), 0, self.room.data_ptr(),
                                self.choice.data_ptr(), self.positions.buffer_info()[0], rows, 0])  # fmt: skip
        self.address = self.call.buffer_info()[0]

    def place(
        self,
        index: int,
        keys: Tensor,
        values: Tensor,
        past: int,
        first: int,
        bits: int | None,
        rows: Tensor | None = None,
    ) -> None:
        """Let layer `index` write position `past` of buffers [R, G, C, D], C > past, and see those from `first` on.

        rows: where each sequence lies in buffers of its own, int64 [R, 8] as `NativeBlock` takes it.
        """
        at, layers = index * _FIELDS, self.layers
        if rows is not self.places[index]:
            self.places[index], layers[at + _ROWS] = rows, 0 if rows is None else rows.data_ptr()
        layers[at + _PAST], layers[at + _FIRST] = past, first
        if keys is self.keys[index] and values is self.values[index]:
            return
        self.keys[index], self.values[index] = keys, values
        layers[at + _KEYS], layers[at + _VALUES], layers[at + _FORMAT] = (
            keys.data_ptr(),
            values.data_ptr(),
            FORMATS[bits],
        )
        layers[at + _STRIDES : at + _STRIDES + 6] = array("q", (*keys.stride()[:3], *values.stride()[:3]))
