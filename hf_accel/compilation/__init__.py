"""Steps of decoding over fixed buffers, captured once and replayed."""

from hf_accel.compilation.config import CompilationConfig
from hf_accel.compilation.patcher import CompilationPatcher

__all__ = ["CompilationConfig", "CompilationPatcher"]
