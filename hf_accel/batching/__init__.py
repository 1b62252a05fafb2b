"""Concurrent `generate` calls of one model as the rows of one running batch."""

from hf_accel.batching.asynchronous import agenerate
from hf_accel.batching.config import BatchingConfig
from hf_accel.batching.patcher import BatchingPatcher
from hf_accel.batching.scope import serving

__all__ = ["BatchingConfig", "BatchingPatcher", "agenerate", "serving"]
