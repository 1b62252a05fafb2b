"""Models in architectures that can have fewer key and value heads, computing what they computed."""

from hf_accel.gqa.architectures.table import WAYS, architectures_for, in_architecture

__all__ = ["WAYS", "architectures_for", "in_architecture"]
