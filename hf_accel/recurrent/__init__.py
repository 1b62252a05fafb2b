"""Recurrent mixers: a single token of the gated delta rule, of Mamba and Mamba-2 and of short convolutions natively."""

from hf_accel.recurrent.patcher import RecurrentStepConfig, RecurrentStepPatcher

__all__ = ["RecurrentStepConfig", "RecurrentStepPatcher"]
