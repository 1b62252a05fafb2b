"""Weights in few bits: products, experts and embeddings that store them, and the step that puts them in place."""

from hf_accel.quantization.linear import QuantizedLinear
from hf_accel.quantization.takeover import CompressedTensorsConfig, CompressedTensorsPatcher
from hf_accel.quantization.weight_only import WeightOnlyConfig, WeightOnlyPatcher

__all__ = [
    "CompressedTensorsConfig",
    "CompressedTensorsPatcher",
    "QuantizedLinear",
    "WeightOnlyConfig",
    "WeightOnlyPatcher",
]
