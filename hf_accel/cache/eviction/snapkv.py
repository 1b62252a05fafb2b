"""SnapKV, Li et al. 2024 (arXiv:2404.14469): what the latest tokens attend to, and its neighbours."""

from __future__ import annotations

from torch import Tensor

from hf_accel.cache.eviction.method import EvictionMethod, Evidence, by_head
from hf_accel.ops.eviction import snapkv_scores


def _scores(evidence: Evidence) -> Tensor:
    return snapkv_scores(by_head(evidence.weights(evidence.window)), evidence.valid)


SNAPKV = EvictionMethod(paper="arXiv:2404.14469", scores=_scores, needs_queries=True)
