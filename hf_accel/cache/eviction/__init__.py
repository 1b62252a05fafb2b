"""Methods that choose which positions of a cache are given up: a file for each, and a row in this table."""

from hf_accel.cache.eviction.h2o import H2O
from hf_accel.cache.eviction.key_norm import KEY_NORM
from hf_accel.cache.eviction.method import EvictionMethod
from hf_accel.cache.eviction.snapkv import SNAPKV
from hf_accel.cache.eviction.streaming import STREAMING
from hf_accel.cache.eviction.tova import TOVA

METHODS: dict[str, EvictionMethod] = {
    "streaming": STREAMING,
    "snapkv": SNAPKV,
    "h2o": H2O,
    "tova": TOVA,
    "key-norm": KEY_NORM,
}
