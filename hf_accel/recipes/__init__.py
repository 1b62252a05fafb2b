"""Recipes: what takes minutes and changes weights, from whole models to whole models.

`uptrain` heals a changed model by distillation from its original; `qat` trains a model in few bits the same way, and
`qat_callback` watches any other training in few bits. Recipes are not part of `import hf_accel`.
"""

from hf_accel.recipes.qat import QuantizationAware, qat
from hf_accel.recipes.result import Uptrained
from hf_accel.recipes.uptrain import uptrain

__all__ = ["QuantizationAware", "Uptrained", "qat", "uptrain"]
