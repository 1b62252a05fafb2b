"""Weights in few bits: products, experts and embeddings that store them, and the step that puts them in place."""

from hf_accel.quantization.adapting import get_qat_peft_model
from hf_accel.quantization.config import GPTQConfig, MixedPrecisionConfig, WeightOnlyConfig
from hf_accel.quantization.deploying import convert_qat
from hf_accel.quantization.gptq import GPTQPatcher
from hf_accel.quantization.mixed import MixedPrecisionPatcher
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import WeightOnlyPatcher
from hf_accel.quantization.qat import QATConfig, QATPatcher
from hf_accel.quantization.takeover import CompressedTensorsConfig, CompressedTensorsPatcher

__all__ = [
    "CompressedTensorsConfig",
    "CompressedTensorsPatcher",
    "GPTQConfig",
    "GPTQPatcher",
    "MixedPrecisionConfig",
    "MixedPrecisionPatcher",
    "QATConfig",
    "QATPatcher",
    "QuantizedLinear",
    "WeightOnlyConfig",
    "WeightOnlyPatcher",
    "convert_qat",
    "get_qat_peft_model",
]
