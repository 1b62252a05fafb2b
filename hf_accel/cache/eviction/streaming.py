"""StreamingLLM, Xiao et al. 2023 (arXiv:2309.17453): the first positions and the latest."""

from __future__ import annotations

from hf_accel.cache.eviction.method import EvictionMethod, Evidence


def _scores(evidence: Evidence) -> None:
    """Return None: nothing but the place of a position decides."""


STREAMING = EvictionMethod(paper="arXiv:2309.17453", scores=_scores)
