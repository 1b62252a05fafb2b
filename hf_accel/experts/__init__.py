"""Mixtures of experts at the price of their active bytes: the routed experts of a layer in one native call."""

from hf_accel.experts.patcher import NativeExpertsConfig

__all__ = ["NativeExpertsConfig"]
