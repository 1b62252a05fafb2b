"""Streaming reads at the pace of the products: what the memory of this machine gives at most."""

from __future__ import annotations

import torch

from hf_accel.kernels.native import library as _library


def stream(buffer: torch.Tensor) -> int:
    """Read a contiguous CPU tensor, whole mebibytes of it, once by all of torch's threads; returns a meaningless sum.

    Raises: ValueError for a tensor that is not aligned to 64 bytes.
    """
    if buffer.data_ptr() % 64 or not buffer.is_contiguous():
        raise ValueError("stream reads contiguous memory aligned to 64 bytes")
    return int(
        _library.library().hfa_stream(
            buffer.data_ptr(), buffer.numel() * buffer.element_size(), torch.get_num_threads()
        )
    )
