"""Native CPU kernels: products and whole decoder layers, in C, called through ctypes.

Optional: where the library was not built, `is_available()` is false and `status().reason` says why.
"""

from hf_accel.kernels.native.attend import MAX_HEAD_DIM, attend, encode
from hf_accel.kernels.native.block import NativeBlock
from hf_accel.kernels.native.block_weights import BlockShape, BlockWeights, Heads, Norm, Projection, heads_in_order
from hf_accel.kernels.native.choose import Rules, choose, exponentials
from hf_accel.kernels.native.experts import Gate, NativeExperts, best_expert_rows
from hf_accel.kernels.native.library import (
    ISAS,
    NativeStatus,
    is_available,
    obstacles,
    set_isa,
    status,
    supported_isas,
)
from hf_accel.kernels.native.linear import DTYPES, FEW_ROWS, MAX_ROWS, best_rows, linear, linear_group
from hf_accel.kernels.native.packed import packed_linear
from hf_accel.kernels.native.prompt import prompt_attention, prompt_state
from hf_accel.kernels.native.recurrent import MixerShape, MixerWeights, NativeMixer, Span
from hf_accel.kernels.native.route import Routing, route
from hf_accel.kernels.native.step import NativeStep
from hf_accel.kernels.native.step_parts import StepEnds, StepMemory
from hf_accel.kernels.native.stream import stream

__all__ = [
    "DTYPES",
    "FEW_ROWS",
    "ISAS",
    "MAX_HEAD_DIM",
    "MAX_ROWS",
    "BlockShape",
    "BlockWeights",
    "Gate",
    "Heads",
    "MixerShape",
    "MixerWeights",
    "NativeBlock",
    "NativeExperts",
    "NativeMixer",
    "NativeStatus",
    "NativeStep",
    "Norm",
    "Projection",
    "Routing",
    "Rules",
    "Span",
    "StepEnds",
    "StepMemory",
    "attend",
    "best_expert_rows",
    "best_rows",
    "choose",
    "encode",
    "exponentials",
    "heads_in_order",
    "is_available",
    "linear",
    "linear_group",
    "obstacles",
    "packed_linear",
    "prompt_attention",
    "prompt_state",
    "route",
    "set_isa",
    "status",
    "stream",
    "supported_isas",
]
