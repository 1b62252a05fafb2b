"""What a step of a whole decoder is made of beside its layers, and the memory that it runs in."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native.block_weights import Norm, Projection
from hf_accel.kernels.weights import FORMATS

_FIELDS = 31  # of hfa_block_call, 8 bytes each
_KEYS, _VALUES, _PAST, _FIRST, _STRIDES, _FORMAT = 4, 5, 9, 10, 17, 27


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
    """What a sequence of steps writes to: the addresses in its cache, a row, the logits and the choice."""

    def __init__(self, layers: int, hidden: int) -> None:
        self.layers = array("q", bytes(8 * _FIELDS * layers))
        self.keys: list[Any] = [None] * layers
        self.values: list[Any] = [None] * layers
        self.row = torch.empty(hidden, dtype=torch.float32)  # of the dtype in fact, which takes no more
        self.room = torch.empty(2 * hidden + 32, dtype=torch.float32)
        self.choice = torch.zeros((1, 1), dtype=torch.int64)
        self.call = array("q", [self.layers.buffer_info()[0], self.row.data_ptr(), 0, self.room.data_ptr(),
                                self.choice.data_ptr(), 0, 0])  # fmt: skip
        self.address = self.call.buffer_info()[0]

    def place(self, index: int, keys: Tensor, values: Tensor, past: int, first: int, bits: int | None) -> None:
        """Let layer `index` write position `past` of buffers [1, G, C, D], C > past, and see those from `first` on."""
        at, layers = index * _FIELDS, self.layers
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
