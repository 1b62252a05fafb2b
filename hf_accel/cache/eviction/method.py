"""What an eviction method is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer's S positions when some of them have to be given up.

    valid: bool [B G, S], which of them hold a token; heads may keep different ones, so that each is a row of its own.
    window: how many of the latest tokens are kept in any case.
    keys: returns the keys [B, G, S, D].
    weights: returns the attention weights [B, G, R, T, S] of the last T queries, for at most as many as are asked for.
    received: fp32 [B, G, S], the attention of all queries so far; only where the method `sums_attention`.
    """

    valid: Tensor
    window: int
    keys: Callable[[], Tensor]
    weights: Callable[[int], Tensor]
    received: Tensor | None


@dataclass(frozen=True, kw_only=True)
class EvictionMethod:
    """A rule by which positions are given up, those of the lowest scores first.

    scores: returns scores [B G, 1, S] of what is there, None where only first and latest positions are kept.
    needs_queries: whether it looks at attention weights.
    sums_attention: whether the attention of every query has to be added up for it, at every step.
    """

    paper: str
    scores: Callable[[Evidence], Tensor | None]
    needs_queries: bool = False
    sums_attention: bool = False


def by_head(states: Tensor) -> Tensor:
    """Return [B, G, ...] as [B G, 1, ...]: every kv head as a row of its own."""
    return states.flatten(0, 1)[:, None]
