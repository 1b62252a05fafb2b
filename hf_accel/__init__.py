"""hf_accel makes Hugging Face `model.generate` fast: one line, the same text, everything undoable."""

from hf_accel import families
from hf_accel.api import optimize, optimized, plan, report, restore
from hf_accel.batching import agenerate, serving
from hf_accel.core.calls.report import Report
from hf_accel.core.config import Config
from hf_accel.core.steps.plan import Plan
from hf_accel.errors import (
    CancelledCallError,
    CheckpointError,
    ConfigError,
    ConflictError,
    HfAccelError,
    IrreversibleError,
    MissingDependencyError,
    ReplicaError,
    StorageError,
    UnsupportedModelError,
    VerificationError,
)
from hf_accel.families import *  # noqa: F403
from hf_accel.gqa import convert_gqa
from hf_accel.loading import load
from hf_accel.quantization import convert_qat, get_qat_peft_model
from hf_accel.quantization.drift import calibration_drift
from hf_accel.quantization.files.loading import from_pretrained
from hf_accel.quantization.files.seal import save_pretrained
from hf_accel.quantization.gguf.quantizer import GGUFConfig
from hf_accel.quantization.gguf.saving import export_gguf

__version__ = "0.2.0"

__all__ = [
    "CancelledCallError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ConflictError",
    "GGUFConfig",
    "HfAccelError",
    "IrreversibleError",
    "MissingDependencyError",
    "Plan",
    "ReplicaError",
    "Report",
    "StorageError",
    "UnsupportedModelError",
    "VerificationError",
    "agenerate",
    "calibration_drift",
    "convert_gqa",
    "convert_qat",
    "export_gguf",
    "from_pretrained",
    "get_qat_peft_model",
    "load",
    "optimize",
    "optimized",
    "plan",
    "report",
    "restore",
    "save_pretrained",
    "serving",
]
__all__ += families.__all__
__all__.sort()
