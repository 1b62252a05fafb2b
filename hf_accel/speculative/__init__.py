"""Speculative decoding: drafters, the governor that decides how much is drafted, and the trials behind it."""

from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.patcher import SpeculativePatcher

__all__ = ["SpeculativeConfig", "SpeculativePatcher"]
