"""More than one machine's worth: the same model in several processes, on Ray.

`run` puts replicas behind Ray Serve and returns a handle; `generate` writes over a data set on Ray Data's pool of
actors. Routing, restarts, health checks and pools are Ray's. Not part of `import hf_accel`, and ray is imported where
it is used: extra `ray`.
"""

from hf_accel.replicas.data import Batches, generate
from hf_accel.replicas.handle import Replicas
from hf_accel.replicas.recipe import ModelRecipe
from hf_accel.replicas.serve import run

__all__ = ["Batches", "ModelRecipe", "Replicas", "generate", "run"]
