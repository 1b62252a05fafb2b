"""Choosing tokens in one native call: penalty, temperature, top-k, top-p, min-p and torch's draw, by selection."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.linear import DTYPE_CODES

_CALL = struct.Struct("=5Q6q4d")
_UNDECIDED = 1  # see hfa_choose
_function: Any = None


@dataclass(frozen=True)
class Rules:
    """What scores go through before the draw, in this order, each as the logits processor of transformers of that name.

    penalty: of tokens that are in the text. temperature, top_k, top_p, min_p: None where there is none.
    """

    penalty: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


def choose(
    logits: Tensor, ids: Tensor | None, starts: Sequence[int] | None, rules: Rules, state: Tensor | None
) -> Tensor | None:
    """Return the tokens [B], int64, that processors with these rules and `torch.multinomial` choose from logits [B, V].

    logits: bf16, fp16 or fp32 on the CPU, the last dimension contiguous. ids: int64 [B, S] contiguous, the text so far,
    of which the penalty is for those from starts[b] on (None: all); None: no penalty. state: of torch's generator,
    which is advanced in place by the draws of B x V exponentials; None: the best token after the penalty. None is
    returned, and the state left alone, where rounding or the order of equal scores decides, or scores are no numbers.

    Raises:
        ValueError: sizes out of range, or a state that is not one of a CPU's generator.
    """
    global _function
    if _function is None:
        _function = _library.library().hfa_choose
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    first = None if starts is None else struct.pack(f"={rows}q", *starts)
    held = None if first is None else torch.frombuffer(bytearray(first), dtype=torch.int64)
    status = _function(
        _CALL.pack(
            logits.data_ptr(),
            0 if ids is None else ids.data_ptr(),
            0 if held is None else held.data_ptr(),
            0 if state is None else state.data_ptr(),
            tokens.data_ptr(),
            DTYPE_CODES[logits.dtype],
            rows,
            vocabulary,
            logits.stride(0),
            0 if ids is None else ids.shape[1],
            rules.top_k or 0,
            0.0 if ids is None else rules.penalty or 0.0,
            rules.temperature or 0.0,
            1.0 if rules.top_p is None else rules.top_p,
            rules.min_p or 0.0,
        )
    )
    if status == _UNDECIDED:
        return None
    if status:
        raise ValueError(f"scores {list(logits.shape)} of {logits.dtype} are no input of native choosing")
    return tokens


def exponentials(state: Tensor, count: int) -> Tensor:
    """Return the fp32 values [count] that `exponential_(1)` draws from a CPU generator's state, which is advanced.

    Raises:
        ValueError: a state that is not one of a CPU's generator.
    """
    found = torch.empty(count)
    if _library.library().hfa_exponentials(state.data_ptr(), found.data_ptr(), count):
        raise ValueError(f"no state of a generator that {count} values could be drawn from")
    return found
