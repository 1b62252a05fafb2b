"""Multi-head attention becomes grouped-query or multi-query attention: fewer key and value heads, a smaller cache."""

from hf_accel.gqa.config import GQAConfig
from hf_accel.gqa.tool import convert_gqa

__all__ = ["GQAConfig", "convert_gqa"]
