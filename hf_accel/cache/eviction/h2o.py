"""H2O, Zhang et al. 2023 (arXiv:2306.14048): what all tokens so far attended to most."""

from __future__ import annotations

from torch import Tensor

from hf_accel.cache.eviction.method import EvictionMethod, Evidence, by_head


def _scores(evidence: Evidence) -> Tensor | None:
    return None if evidence.received is None else by_head(evidence.received)


H2O = EvictionMethod(paper="arXiv:2306.14048", scores=_scores, needs_queries=True, sums_attention=True)
