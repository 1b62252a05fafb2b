"""The router of a mixture of experts in one native call, for few tokens; cost: its weight read once."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_accel.kernels.native import library as _library
from hf_accel.kernels.native.linear import DTYPE_CODES, MAX_ROWS

MAX_EXPERTS = 512
_CALL = struct.Struct("=6Q9q")
_UNDECIDED = 1  # see hfa_route
_get_num_threads = torch.get_num_threads
_function: Any = None


class Routing(NamedTuple):
    """How a router makes weights of logits.

    is_normed: softmax over the chosen experts, which is softmax over all divided by its sum over the chosen; else over
    all. logits_dtype, weights_dtype: of what it returns.
    """

    is_normed: bool
    logits_dtype: torch.dtype
    weights_dtype: torch.dtype


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, choices: int, routing: Routing
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return logits [T, n], weights [T, k] and ids int64 [T, k] for x [T, E] contiguous and weight [n, E].

    Experts are in falling order of their logits. None: the last one chosen ties with one that is not, or logits are no
    numbers, so that the choice is PyTorch's.

    Raises:
        ValueError: more than 32 tokens, 512 experts, or other sizes out of range.
    """
    global _function
    if _function is None:
        _function = _library.library().hfa_route
    tokens, hidden = x.shape
    experts = weight.shape[0]
    logits = x.new_empty((tokens, experts))
    weights = x.new_empty((tokens, choices), dtype=routing.weights_dtype)
    ids = x.new_empty((tokens, choices), dtype=torch.int64)
    status = _function(
        _CALL.pack(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            logits.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            DTYPE_CODES[x.dtype],
            tokens,
            hidden,
            experts,
            weight.stride(0),
            choices,
            routing.is_normed,
            routing.weights_dtype is torch.float32,
            _get_num_threads(),
        )
    )
    if status == _UNDECIDED:
        return None
    if status:
        raise ValueError(
            f"a native router takes 1 to {MAX_ROWS} tokens and up to {MAX_EXPERTS} experts; got {tokens} and "
            f"{experts}, of which {choices} are chosen"
        )
    return logits if routing.logits_dtype is x.dtype else logits.to(routing.logits_dtype), weights, ids
