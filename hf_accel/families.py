"""The families of optimisations, one import each: importing a family registers its patchers, keywords and sections."""

from hf_accel.attention import AttentionConfig
from hf_accel.batching import BatchingConfig
from hf_accel.cache import KVCacheConfig
from hf_accel.compilation import CompilationConfig
from hf_accel.decoding import DecodingConfig
from hf_accel.experts import ExpertOffloadConfig, NativeExpertsConfig
from hf_accel.gqa import GQAConfig
from hf_accel.layers import DecoderBlockConfig, DeviceBlockConfig, NativeLinearConfig, SharedProjectionConfig
from hf_accel.pages import LargePagesConfig
from hf_accel.quantization import (
    CompressedTensorsConfig,
    GPTQConfig,
    MixedPrecisionConfig,
    QATConfig,
    WeightOnlyConfig,
)
from hf_accel.recurrent import RecurrentStepConfig
from hf_accel.speculative import SpeculativeConfig

__all__ = [
    "AttentionConfig",
    "BatchingConfig",
    "CompilationConfig",
    "CompressedTensorsConfig",
    "DecoderBlockConfig",
    "DecodingConfig",
    "DeviceBlockConfig",
    "ExpertOffloadConfig",
    "GPTQConfig",
    "GQAConfig",
    "KVCacheConfig",
    "LargePagesConfig",
    "MixedPrecisionConfig",
    "NativeExpertsConfig",
    "NativeLinearConfig",
    "QATConfig",
    "RecurrentStepConfig",
    "SharedProjectionConfig",
    "SpeculativeConfig",
    "WeightOnlyConfig",
]
