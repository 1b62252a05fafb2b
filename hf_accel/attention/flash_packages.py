"""Where the functions of FlashAttention come from: its packages, or the hub through the package `kernels`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

from hf_accel.errors import described


class FlashFunctions(NamedTuple):
    """Attention of batches [B, T, H, D], and of rows one after the other; options: the keywords both take."""

    batched: Callable[..., Any]
    ragged: Callable[..., Any]
    options: frozenset[str]


def functions_of(module: Any) -> FlashFunctions:
    """Return the functions of a package, or of a kernel of the hub."""
    batched, ragged = module.flash_attn_func, module.flash_attn_varlen_func
    return FlashFunctions(batched, ragged, parameters(batched) & parameters(ragged))


@functools.cache
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of what a function takes."""
    return frozenset(inspect.signature(function).parameters)


def is_installed(module: str) -> bool:
    """Return whether a package can be imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing, or was put in place by hand
        return False


def failure(module: str) -> str | None:
    """Return why an installed package cannot be used: it may have been built for another torch."""
    try:
        functions_of(importlib.import_module(module))
    except (ImportError, AttributeError, OSError) as error:
        return f"{module} cannot be used here ({described(error)})"
    return None


def has_kernels() -> bool:
    """Return whether the package `kernels` is there, which other folders are called, too."""
    try:
        return bool(metadata.version("kernels"))
    except metadata.PackageNotFoundError:
        return False


@functools.cache
def from_hub(repository: str, version: int) -> Any:
    """Return a kernel of the hub, or why it cannot be had."""
    try:
        return importlib.import_module("kernels").get_kernel(repository, version=version)
    except Exception as error:  # the network, the build for this torch, the package itself
        return f"{repository} could not be loaded ({described(error)})"
