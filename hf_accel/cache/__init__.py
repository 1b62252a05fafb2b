"""Key/value caches. A layer is where keys and values lie and how they grow; the cache object stays transformers'."""

from hf_accel.cache.config import KVCacheConfig
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.cache.patcher import KVCachePatcher
from hf_accel.cache.tiers import spill

__all__ = ["GrowingLayer", "GrowingSlidingLayer", "KVCacheConfig", "KVCachePatcher", "spill"]
