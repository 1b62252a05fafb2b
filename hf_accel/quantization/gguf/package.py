"""The gguf package, which knows types, names and keys of the format: optional, and imported where it is used."""

from __future__ import annotations

import importlib
from typing import Any

from hf_accel.errors import MissingDependencyError


def gguf_package() -> Any:
    """Return the module `gguf`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependencyError(
            f"GGUF files are read and written with the gguf package, which cannot be imported ({error}). "
            "Install it: pip install 'hf-accel[gguf]'."
        ) from error
