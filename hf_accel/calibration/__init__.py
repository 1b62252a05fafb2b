"""Choosing lossy steps by their measured cost: the text to measure on, and the bits of every layer."""

from hf_accel.calibration.bits import DEFAULT_MAX_KL, Choice, choose_bits, losers, measured
from hf_accel.calibration.text import calibration_text

__all__ = ["DEFAULT_MAX_KL", "Choice", "calibration_text", "choose_bits", "losers", "measured"]
