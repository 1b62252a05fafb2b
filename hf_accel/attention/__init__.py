"""Attention back ends, registered beside transformers' own and selected per model."""

from hf_accel.attention.patcher import AttentionConfig, AttentionPatcher

__all__ = ["AttentionConfig", "AttentionPatcher"]
