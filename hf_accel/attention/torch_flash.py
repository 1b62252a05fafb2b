"""The FlashAttention that torch brings along for CUDA, called with what scaled_dot_product_attention does not hand on.

That function has no variable lengths, no windows and no causal mask that ends in the lower right corner; the operator
beneath it has. It is no public one, so that it is compared with the reference before it is used.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_accel.attention.kernel import HALF
from hf_accel.attention.question import Visible
from hf_accel.attention.ragged import packed, ragged_rows
from hf_accel.core.calls.bands import Band
from hf_accel.ops import tolerances
from hf_accel.ops.tiled import tiled_attention

MAX_HEAD_DIM = 256
_operator: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible, scale: float
) -> torch.Tensor:
    """Return causal attention [B, T, H, D] of query [B, H, T, D]; padding is left out of it, and given zeros."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = {} if visible.window is None else {"window_size_left": visible.window - 1, "window_size_right": 0}
    if visible.starts is None or visible.band is None:
        found = _operator(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale, **window)
        return found[0].contiguous()  # type: ignore[no-any-return]
    rows = ragged_rows(visible.band, query.device)
    states = (packed(x, rows.queries if x is q else rows.columns) for x in (q, k, v))
    ends, lengths = (rows.query_ends, rows.column_ends), (rows.most_queries, rows.most_columns)
    found = _operator(*states, *ends, *lengths, 0.0, True, False, scale=scale, **window)
    output = query.new_zeros((q.shape[0] * q.shape[1], *q.shape[2:]))
    return output.index_copy_(0, rows.queries, found[0]).view(q.shape)


def is_usable(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the operator serves heads of this size and dtype here, and is right."""
    size = query.shape[3]
    fits = query.dtype in HALF and size == value.shape[3] <= MAX_HEAD_DIM and size % 8 == 0
    return query.is_cuda and fits and _is_right(query.device, query.dtype, size)


@functools.cache
def _is_right(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, size, generator=generator).to(device, dtype)
        for heads, length in ((4, 140), (2, 200), (2, 200))
    )
    try:
        for starts, window in (((0, 0), None), ((150, 3), None), ((0, 0), 33), ((20, 90), 33)):
            band = Band(140, 200, starts, window, device)
            found = flash_attention(query, key, value, Visible(True, band), size**-0.5)
            expected, _ = tiled_attention(query, key, value, window=window, starts=band.starts_tensor)
            wrong = (found.transpose(1, 2).float() - expected.float()).norm() / expected.float().norm()
            if not float(wrong) <= tolerances.of_attention(dtype):
                return False
    except (RuntimeError, TypeError, AttributeError):  # a card or a release that has it otherwise
        return False
    return True
