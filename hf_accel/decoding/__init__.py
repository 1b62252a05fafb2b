"""The token loop: propose, forward, accept, append."""

from hf_accel.decoding.patcher import DecodingConfig, DecodingPatcher

__all__ = ["DecodingConfig", "DecodingPatcher"]
