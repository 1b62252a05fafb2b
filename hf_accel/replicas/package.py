"""The ray package, imported where it is used."""

from __future__ import annotations

import importlib
from typing import Any

from hf_accel.errors import MissingDependencyError


def ray_module(name: str = "ray") -> Any:
    """Return a module of ray: "ray", "ray.serve", "ray.data", "ray.exceptions".

    Raises:
        MissingDependencyError: ray, or what that part of it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"Replicas run on Ray, and {name} cannot be imported ({error}): pip install 'hf-accel[ray]'. Without it, "
            "processes share out prompts by accelerate, see docs/replicas.md."
        ) from error
