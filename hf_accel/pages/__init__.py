"""Weights as they lie, in large pages of memory."""

from hf_accel.pages.patcher import LargePagesConfig, LargePagesPatcher

__all__ = ["LargePagesConfig", "LargePagesPatcher"]
