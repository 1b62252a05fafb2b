"""TOVA, Oren et al. 2024 (arXiv:2401.06104): what the last token attends to, the same for all heads of a layer."""

from __future__ import annotations

from torch import Tensor

from hf_accel.cache.eviction.method import EvictionMethod, Evidence, by_head
from hf_accel.ops.eviction import tova_scores


def _scores(evidence: Evidence) -> Tensor:
    weights = evidence.weights(1)
    shared = weights.mean(dim=1, keepdim=True).expand_as(weights)
    return tova_scores(by_head(shared), evidence.valid)


TOVA = EvictionMethod(paper="arXiv:2401.06104", scores=_scores, needs_queries=True)
