"""The layers of a decoder: its products, products that share an input, and whole blocks in one native call."""

from hf_accel.layers.block import DecoderBlockConfig, DecoderBlockPatcher
from hf_accel.layers.device_block import DeviceBlockConfig, DeviceBlockPatcher
from hf_accel.layers.linear import NativeLinearConfig, NativeLinearPatcher
from hf_accel.layers.siblings import SharedProjectionConfig, SharedProjectionPatcher

__all__ = [
    "DecoderBlockConfig",
    "DecoderBlockPatcher",
    "DeviceBlockConfig",
    "DeviceBlockPatcher",
    "NativeLinearConfig",
    "NativeLinearPatcher",
    "SharedProjectionConfig",
    "SharedProjectionPatcher",
]
