"""Mixtures of experts at the price of their active bytes: the routed experts of a layer in one native call.

offload: experts that do not fit in memory.
"""

from hf_accel.experts.offload import ExpertOffloadConfig
from hf_accel.experts.patcher import NativeExpertsConfig

__all__ = ["ExpertOffloadConfig", "NativeExpertsConfig"]
