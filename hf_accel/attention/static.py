"""Attention of a step over fixed buffers of which only the device knows how full they are.

On CUDA devices by a kernel that reads what is filled; elsewhere by torch, over the whole buffers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hf_accel.core.calls.cache_layers import StaticLayer
from hf_accel.ops.static_attention import static_attention


@functools.cache
def _kernel() -> Callable[..., torch.Tensor] | None:
    """Return the kernel of CUDA devices; None where Triton is not installed."""
    try:
        return importlib.import_module("hf_accel.kernels.triton.attention").decode_attention  # type: ignore[no-any-return]
    except ImportError:
        return None


def attend_static(
    query: torch.Tensor,
    layer: StaticLayer,
    scale: float | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention [B, H, T, Dv] of query [B, H, T, D], whose tokens `layer` has just taken in.

    Masks are not asked for: what is visible follows from the layer's lengths, starts and window.
    """
    attend = _kernel() if query.is_cuda and not isinstance(query, FakeTensor) else None
    return (attend or static_attention)(
        query,
        layer.keys,
        layer.values,
        layer.lengths,
        layer.starts,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        bits=layer.bits,
        head_dims=layer.sizes,
        window=layer.sliding_window,
        softcap=softcap,
        sinks=sinks,
    )
