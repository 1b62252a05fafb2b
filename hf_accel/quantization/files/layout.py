"""How one product is stored in a checkpoint: what every layout of files says and reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_accel.errors import CheckpointError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files.checkpoint import Checkpoint

INTEGERS = (torch.int32,)
INDICES = (torch.int32, torch.int64)


class Stored(NamedTuple):
    """A weight as a file holds it; packed where its bits are taken as they are.

    order: the input column that each of its columns reads, int64 [K]; None: the same.
    """

    weight: Affine | PackedWeight
    order: Tensor | None


class Source:
    """The tensors of the product `name` in a checkpoint; `used` are the full names of those that were read."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.used: set[str] = set()

    def __contains__(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self.checkpoint

    def shape(self, suffix: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None where there is none of this name."""
        return self.checkpoint.shape(f"{self.name}.{suffix}") if suffix in self else None

    def tensor(self, suffix: str, shape: Iterable[int], *dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Return a tensor of this shape, of one of `dtypes`, or else of a floating-point dtype.

        Raises: as `Checkpoint.tensor`.
        """
        found = self.checkpoint.tensor(f"{self.name}.{suffix}", shape, *dtypes)
        self.used.add(f"{self.name}.{suffix}")
        return found

    def scales(self, suffix: str, shape: Iterable[int]) -> Tensor:
        """Return scales, all of which are numbers; negative ones and zeros are.

        Raises:
            CheckpointError: there are none, or they hold NaN or infinity.
        """
        found = self.tensor(suffix, shape)
        if not bool(found.isfinite().all()):
            raise self.damaged(suffix, "it holds NaN or infinity")
        return found

    def is_ours(self, suffix: str) -> bool:
        """Return whether the file of a tensor carries our stamp, so that it was written by us."""
        return self.checkpoint.is_stamped(f"{self.name}.{suffix}")

    def damaged(self, suffix: str, fault: str) -> CheckpointError:
        """Return the error that says what is wrong with a tensor."""
        return self.checkpoint.damaged(f"{self.name}.{suffix}", fault)


class Layout(Protocol):
    """One way to store a product; `scheme` is what the checkpoint's description says of its weight."""

    @property
    def scheme(self) -> Scheme: ...

    def read(self, source: Source, rows: int, columns: int) -> Stored:
        """Return the weight [rows, columns].

        Raises:
            CheckpointError: a tensor is missing or damaged, or holds what cannot be served.
        """
        ...


class Description(Protocol):
    """What a `quantization_config` says of the products of a checkpoint.

    is_public: other programs read it, too, and tensors have the names that transformers stores them under.
    """

    is_public: bool

    def layout(self, name: str, module: Any, checkpoint: Checkpoint, /) -> Layout | None:
        """Return how the module called `name` is stored, None for one that is not packed.

        Raises:
            CheckpointError: tensors and description disagree.
        """
        ...
