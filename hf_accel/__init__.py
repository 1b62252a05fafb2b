"""hf_accel makes Hugging Face `model.generate` fast: one line, the same text, everything undoable."""

from hf_accel.api import optimize, optimized, plan, report, restore
from hf_accel.attention import AttentionConfig
from hf_accel.cache import KVCacheConfig
from hf_accel.core.calls.report import Report
from hf_accel.core.config import Config
from hf_accel.core.steps.plan import Plan
from hf_accel.decoding import DecodingConfig
from hf_accel.errors import (
    CheckpointError,
    ConfigError,
    ConflictError,
    HfAccelError,
    IrreversibleError,
    MissingDependencyError,
    StorageError,
    UnsupportedModelError,
    VerificationError,
)
from hf_accel.layers import DecoderBlockConfig, NativeLinearConfig, SharedProjectionConfig
from hf_accel.quantization import WeightOnlyConfig
from hf_accel.quantization.files.loading import from_pretrained
from hf_accel.quantization.files.seal import save_pretrained
from hf_accel.quantization.takeover import CompressedTensorsConfig
from hf_accel.speculative import SpeculativeConfig

__version__ = "0.2.0"

__all__ = [
    "AttentionConfig",
    "CheckpointError",
    "CompressedTensorsConfig",
    "Config",
    "ConfigError",
    "ConflictError",
    "DecoderBlockConfig",
    "DecodingConfig",
    "HfAccelError",
    "IrreversibleError",
    "KVCacheConfig",
    "MissingDependencyError",
    "NativeLinearConfig",
    "Plan",
    "Report",
    "SharedProjectionConfig",
    "SpeculativeConfig",
    "StorageError",
    "UnsupportedModelError",
    "VerificationError",
    "WeightOnlyConfig",
    "from_pretrained",
    "optimize",
    "optimized",
    "plan",
    "report",
    "restore",
    "save_pretrained",
]
