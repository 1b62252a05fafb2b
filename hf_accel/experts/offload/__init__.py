"""Experts that do not fit in memory: in a file, with those that are used most in memory."""

from hf_accel.experts.offload.config import ExpertOffloadConfig
from hf_accel.experts.offload.patcher import ExpertOffloadPatcher

__all__ = ["ExpertOffloadConfig", "ExpertOffloadPatcher"]
