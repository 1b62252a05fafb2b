"""What rounding explains: how far the results of two computations of the same mathematics may be from each other.

Other orders of summation and the roundings to the dtype in between change last bits, and layers carry them on. Every
bound is a relative difference of Frobenius norms, by what is compared; a result beyond its bound is taken to be wrong.
Products with packed weights also round their inputs, to 255 codes at 4 bits: a last bit may send a value to the next.
"""

from __future__ import annotations

import torch

ONE_PRODUCT = 3e-2  # a bf16 product with packed weights, by another kernel
_LAYER = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_LAYER_PACKED = 1e-2
_STEP = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_STEP_PACKED = 2e-2
_TEXT = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_TEXT_PACKED = 2e-2
_ATTENTION = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_OTHER_DTYPES = 1e-3


def of_layer_output(dtype: torch.dtype, is_packed: bool) -> float:
    """Return the bound for the output of one decoder layer, of which `is_packed` says whether it has packed weights."""
    return max(_LAYER[dtype], _LAYER_PACKED) if is_packed else _LAYER[dtype]


def of_step_logits(dtype: torch.dtype, is_packed: bool) -> float:
    """Return the bound for a model's logits at one position, when it reads tokens one by one or several in a step."""
    limit = _STEP.get(dtype, _OTHER_DTYPES)
    return max(limit, _STEP_PACKED) if is_packed else limit


def of_text_logits(dtype: torch.dtype, is_rounded: bool = False) -> float:
    """Return the bound for a model's logits over a prompt and the steps after it, under exact optimisations.

    is_rounded: it has packed weights, or its cache keeps codes, in both the optimised model and the one it is compared
        with.
    """
    limit = _TEXT.get(dtype, _OTHER_DTYPES)
    return max(limit, _TEXT_PACKED) if is_rounded else limit


def of_attention(dtype: torch.dtype) -> float:
    """Return the bound for what one query is given by attention in `dtype`, against the same in float64."""
    return _ATTENTION.get(dtype, _OTHER_DTYPES)
