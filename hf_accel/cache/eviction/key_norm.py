"""Key norm, Devoto et al. 2024 (arXiv:2406.11430): keys of small norm attract attention; no query is needed."""

from __future__ import annotations

from torch import Tensor

from hf_accel.cache.eviction.method import EvictionMethod, Evidence, by_head
from hf_accel.ops.eviction import key_norm_scores


def _scores(evidence: Evidence) -> Tensor:
    return by_head(key_norm_scores(evidence.keys()))


KEY_NORM = EvictionMethod(paper="arXiv:2406.11430", scores=_scores)
