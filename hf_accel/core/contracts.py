"""What families may expect of one another, beyond transformers' own contracts, without importing one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from hf_accel.kernels.packed import PackedWeight


class AppendableLayer(Protocol):
    """A cache layer into whose buffers a kernel may write new keys and values itself.

    `reserve` returns key and value buffers [B, G, C, D] (C >= past + T), `past`, the position where the first new
    token belongs, and `first`, the first position the new tokens can see; or None if it cannot take them that way.
    After the kernel has written positions past..past+T-1, `commit(T)` makes them part of the cache.
    """

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, int, int] | None: ...

    def commit(self, tokens: int) -> None: ...


@runtime_checkable
class PackedProduct(Protocol):
    """A linear product whose weight [N, K] is stored in few bits, in the layout of the native kernels."""

    @property
    def packed(self) -> PackedWeight: ...
