"""The choice of the next token from logits."""

from __future__ import annotations

from torch import Tensor


def choose(logits: Tensor, ids: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Return the argmax of logits [B, V], int64 [B]: of what is equal the first, a NaN where there is one.

    Where ids [B, C] are given, it is written to ids[b, positions[b]].
    """
    tokens = logits.argmax(dim=-1)
    if ids is not None and positions is not None:
        ids.scatter_(1, positions.long()[:, None], tokens[:, None])
    return tokens
