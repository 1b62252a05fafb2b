"""Recipes: what takes minutes and changes weights, from whole models to whole models.

`uptrain` heals a changed model by distillation from its original. Recipes are not part of `import hf_accel`.
"""

from hf_accel.recipes.result import Uptrained
from hf_accel.recipes.uptrain import uptrain

__all__ = ["Uptrained", "uptrain"]
