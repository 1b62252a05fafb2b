"""The token loop: propose, forward, accept, append."""

from hf_accel.decoding.loop import DecodingConfig, DecodingPatcher

__all__ = ["DecodingConfig", "DecodingPatcher"]
