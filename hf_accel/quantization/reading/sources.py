"""What models are read from: every source says which names are its own, and reads what a request asks for.

A source is one file with a class, and one line in `register`, which knows them all. `hf_accel.load` applies goals and
configs to what a source returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.core.calls.report import Applied, Skip
from hf_accel.quantization.config import WeightOnlyConfig


def _nothing() -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be read.

    name: as the user gave it: a folder, a file, the name of a model on the hub.
    config: how weights that are not packed are rounded while they are read; None: they stay as they are stored.
    dtype: of everything that is not packed; None: as stored.
    memory_budget_bytes: what weights may take, with the tensor at hand while they are read; the source chooses the bits
        that lose least within it, and `config` is None.
    cache: what was packed is kept beside the model, and mapped the next time.
    large_pages: tensors are read into memory of large pages, where the system grants it, and none is mapped.
    advance: to be called after each tensor.
    """

    name: str
    config: WeightOnlyConfig | None = None
    dtype: torch.dtype | None = None
    memory_budget_bytes: int | None = None
    cache: bool = False
    large_pages: bool = False
    advance: Callable[[], None] = _nothing


@dataclass
class Loaded:
    """A model as it was read: complete, on the CPU, in evaluation mode.

    applied: what reading has done to its weights, for the report; skipped: what it left out and why.
    weight_bytes: of its weights as the files hold them, where some are packed.
    """

    model: Any
    applied: tuple[Applied, ...] = ()
    skipped: tuple[Skip, ...] = ()
    weight_bytes: int | None = None


class Source(Protocol):
    """One kind of place that models are read from."""

    def claims(self, name: str) -> bool:
        """Return whether `name` is for this source to read; by the name, and without opening anything large."""
        ...

    def read(self, request: Request) -> Loaded:
        """Return the model.

        Raises:
            CheckpointError: a file is missing, damaged, truncated or of another format; it and the tensor are named.
            ConfigError: what is asked for does not fit; or nothing fits the budget, and what would is stated.
            UnsupportedModelError: the model cannot be rounded in this way.
        """
        ...
