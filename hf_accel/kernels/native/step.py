"""A token of each sequence through a whole decoder in one native call: embedding, layers, norm, head, best logits.

Cost: the decoder's weights read once, and some five microseconds of Python beside the reservations in the cache.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.block import NativeBlock, packed_matrix, packed_norm
from hf_accel.kernels.native.linear import DTYPE_CODES
from hf_accel.kernels.native.step_parts import StepEnds, StepMemory

_LAYER = struct.Struct("=3Q3q")
_HEAD = struct.Struct("=4qQqdQ3q")
_LAST = struct.Struct("=2dQ")
_get_num_threads = torch.get_num_threads


class NativeStep:
    """A decoder's step; holds its tensors, and their addresses as C wants them.

    blocks: of all layers in their order. angles: of each layer cos and sin by position [positions, R], in the dtype or
    in fp32, or None. Raises: ValueError naming what does not fit; RuntimeError without the native library.
    """

    def __init__(
        self, blocks: Sequence[NativeBlock], ends: StepEnds, angles: Sequence[tuple[Tensor, Tensor] | None]
    ) -> None:
        self.blocks, self.ends, self.dtype = list(blocks), ends, blocks[0].dtype
        self.hidden = blocks[0].shape.hidden
        self._function: Any = _library.library().hfa_step_forward
        self._check()
        self.vocabulary = ends.head.weight.shape[0]
        self._blocks = [ctypes.create_string_buffer(block.packed, len(block.packed)) for block in blocks]
        self.angles = list(angles)
        self.threads = 0  # of its calls; 0: as many as torch has
        self._pack()

    def _check(self) -> None:
        ends, weight, norm = self.ends, self.ends.head.weight, self.ends.norm
        dense = [ends.embedding, ends.positions, *(() if norm is None else (norm.weight, norm.bias))]
        wide = [(tensor, self.hidden) for tensor in (*dense, weight if isinstance(weight, Tensor) else None)]
        for tensor, size in (*wide, (ends.head.bias, weight.shape[0])):
            if tensor is None or (tensor.shape[-1] == size and tensor.dtype is self.dtype and tensor.is_cpu and
                                  tensor.stride(-1) == 1 and tensor.data_ptr()):  # fmt: skip
                continue
            raise ValueError(f"a tensor {tuple(tensor.shape)} of {tensor.dtype} is not [.., {size}] of {self.dtype}")
        if weight.shape[1] != self.hidden:
            raise ValueError(f"the head does not read the layers' {self.hidden} values")
        if any(block.dtype is not self.dtype or block.shape.hidden != self.hidden or block.shape.part != "layer" or
               block.shape.k is None for block in self.blocks):  # fmt: skip
            raise ValueError("not all layers are whole ones of one dtype and size")

    def _pack(self) -> None:
        layers = b""
        lengths = [len(pair[0]) for pair in self.angles if pair is not None]
        for block, pair in zip(self._blocks, self.angles, strict=True):
            place = ctypes.addressof(block)
            if pair is None:
                layers += _LAYER.pack(place, 0, 0, 0, 0, 0)
                continue
            cos, sin = pair
            is_f32 = cos.dtype is torch.float32
            is_known = is_f32 or cos.dtype is self.dtype
            is_table = cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape
            if not (is_table and is_known and cos.dtype is sin.dtype):
                raise ValueError("angles are no contiguous tables of the dtype or of fp32")
            layers += _LAYER.pack(place, cos.data_ptr(), sin.data_ptr(), cos.shape[1], cos.stride(0), is_f32)
        self._layers = ctypes.create_string_buffer(layers, len(layers))
        ends, table = self.ends, self.ends.positions
        if table is not None:
            lengths.append(len(table) - ends.offset)
        self.positions = min(lengths, default=2**62)  # how many positions the step knows
        learned = (0, 0, 0, 0) if table is None else (table.data_ptr(), table.stride(0), ends.offset, len(table))
        head = _HEAD.pack(DTYPE_CODES[self.dtype], len(self.blocks), self.hidden, ends.embedding.shape[0],
                          ends.embedding.data_ptr(), ends.embedding.stride(0), ends.scale, *learned)  # fmt: skip
        last = _LAST.pack(ends.logit_scale, ends.softcap, ctypes.addressof(self._layers))
        packed = b"".join((head, packed_norm(ends.norm), packed_matrix(ends.head), last))
        self._step = ctypes.create_string_buffer(packed, len(packed))
        self._address = ctypes.addressof(self._step)

    def __call__(self, memory: StepMemory, *position: int) -> Tensor | None:
        """Return the logits [R, 1, V'] of the tokens in `memory.choice`, each at its position; choices: their best.

        The first of equal ones, NaN before all others. Positions < self.positions; every layer's place must have been
        said. What `NativeBlock` says of sequences side by side holds. None: a score of an attention is not finite, or
        a token is none; the choices are as before then.
        """
        if len(position) != memory.rows:
            raise ValueError(f"a step of {memory.rows} rows takes as many positions, got {len(position)}")
        logits = torch.empty((memory.rows, 1, self.vocabulary), dtype=self.dtype)
        call = memory.call
        memory.positions[:] = array("q", position)
        call[2], call[7] = logits.data_ptr(), self.threads or _get_num_threads()
        return None if self._function(self._address, memory.address) else logits
