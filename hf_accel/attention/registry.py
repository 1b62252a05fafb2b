"""Where attention of ours becomes known: to transformers, under a name, and to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from hf_accel.attention.kernel import AttentionKernel
from hf_accel.core.model.back_ends import BackEnd, add_back_end

KERNELS: dict[str, AttentionKernel] = {}
"""The attention kernels by name, in the order in which calls go down from one to the next."""


def register(back_end: BackEnd, forward: Callable[..., Any], make_mask: Callable[..., Any]) -> None:
    """Register a back end under its name, which is ours alone: nothing of transformers' is replaced.

    forward: attention in transformers' calling convention. make_mask: makes its masks; without an entry of its own in
    that registry, transformers would drop the mask of padded batches.
    """
    name = str(back_end.name)  # a plain text: torch.compile traces lookups in these registries, of any model
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, make_mask)
    add_back_end(back_end)


def add_kernel(kernel: AttentionKernel) -> None:
    """Add a kernel at the end of the ladder."""
    KERNELS[kernel.name] = kernel
