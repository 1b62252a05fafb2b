"""What belongs to the offloaded experts of one model: the file and the slots.

Copies of a model that share its tensors, as drafts and trials are made on, share it, too.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from hf_accel.errors import IrreversibleError, StorageError
from hf_accel.experts.offload.file import ExpertsFile, Extent, memory_of
from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.stored import StoredExperts, first_tensor

Modules = list[tuple[nn.Module, StoredExperts]]
_STORES: WeakValueDictionary[int, ExpertStore] = WeakValueDictionary()  # by the identity of the first tensor


class ExpertStore:
    """The experts of some modules in a file."""

    def __init__(self, folder: str | None, modules: Modules, budget: int) -> None:
        """Write the file; nothing is changed yet.

        Raises:
            ConfigError, StorageError: no file can be written in the folder, or not one of this size.
        """
        self.modules = [each for _, each in modules]
        self.file = ExpertsFile(folder, self.modules[-1].end)
        for each in self.modules:
            for tensor, offset in each.tensors:
                self.file.write(tensor, offset)
        self.slots = Slots(self.file, self.modules, budget)
        self._mapping = self.file.mapped()

    def take(self, module: nn.Module, stored: StoredExperts) -> None:
        """Have the experts of a module lie in the file instead of in memory."""
        stored.move(self._mapping, module)
        _STORES[id(stored.tensors[0][0])] = self

    def bring_back(self) -> None:
        """Put the weights back into memory, one tensor at a time.

        Raises:
            IrreversibleError: the file is no longer whole; what could be read is in memory, and all else as it was.
        """
        for each in self.modules:
            written = each.written()
            for place, (tensor, offset) in enumerate(each.tensors):
                if place in written:
                    tensor.data = tensor.detach().clone()
                    continue
                try:
                    tensor.data = self._read(tensor, offset)
                except StorageError as error:
                    raise IrreversibleError(
                        f"The experts of {each.path} cannot be restored, those before them are. {error}"
                    ) from error

    def _read(self, tensor: Tensor, offset: int) -> Tensor:
        found = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.file.read([Extent(offset, found.numel() * found.element_size())], memory_of(found))
        return found


def return_memory() -> None:
    """Have the C library give freed memory back to the system, where it would keep it for itself (glibc)."""
    with suppress(OSError, AttributeError):  # other libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def store_of(module: nn.Module) -> tuple[ExpertStore, StoredExperts] | None:
    """Return where the experts of a module lie already, None if they lie in memory or were changed since."""
    tensor = first_tensor(module)
    store = None if tensor is None else _STORES.get(id(tensor))
    if store is None:
        return None
    return next(
        ((store, x) for x in store.modules if x.tensors[0][0] is tensor and x.are_there() and x.is_of(module)), None
    )
