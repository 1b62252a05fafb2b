"""The experts of one module: their place in the file, and the native call that computes with them wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.experts import ExpertsForm, described_experts
from hf_accel.core.model.packed_experts import described_packed, packed_products
from hf_accel.experts.offload.file import PAGE, Extent
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedWeight, dense_matrix, moved_matrix

ALIGNED = 64  # bytes, of each tensor in a slot and in the file


class StoredExperts:
    """What `module` is when its weights lie in a file from byte `start` on; `end`: where others may begin.

    tensors: those that are moved to the file, with their offsets. bytes_of: of each expert in memory. kernel: the
    native call; experts that are in no slot have the addresses of the mapped file. first: the number of the first
    expert among those of all modules. handed_on: calls that the module's own code served.
    """

    def __init__(self, path: str, module: Any, dtype: torch.dtype, start: int, first: int) -> None:
        """Describe them, changing nothing. Raises ValueError with the reason if the native call does not fit."""
        self.path, self.dtype, self.first, self.handed_on = path, dtype, first, 0
        products = packed_products(module)
        self.products = None if products is None else [*products[0], *products[1]]
        self.form = form_of(module)
        if dtype not in native.DTYPES:
            raise ValueError(f"the native library has no products of {dtype}")
        biases = [getattr(p, "bias", None) for p in self.products or ()]
        if products is None:
            biases = [p for name, p in module.named_parameters(recurse=False) if name.endswith("_bias")]
        kept: list[Tensor] = [bias for bias in biases if bias is not None]
        self.tensors: list[tuple[Tensor, int]] = []
        self._state: list[tuple[int, int]] = []
        self.extents: list[tuple[Extent, ...]] = []
        self._places: list[tuple[tuple[int, ...], ...]] = []
        self.end = self._lay_out_dense(module, start) if products is None else self._lay_out_packed(*products, start)
        if products is None:
            kept += [tensor for tensor, _ in self.tensors]
        if any(tensor.dtype is not dtype for tensor in kept):
            raise ValueError(f"their tensors are not all of {dtype}")
        moved = [tensor for tensor, _ in self.tensors]
        if not all(t.is_cpu and t.is_contiguous() and t.data_ptr() for t in [*kept, *moved]):
            raise ValueError("their tensors do not lie in one piece of memory each")
        self.bytes_of = [max(e.place + e.size for e in extents) for extents in self.extents]

    def _lay_out_dense(self, module: Any, start: int) -> int:
        """Stacked tensors lie one after the other, so that each is one tensor still."""
        spans = []
        for name in ("gate_up_proj", "down_proj"):
            tensor = module._parameters[name]
            self.tensors.append((tensor, start))
            size = tensor[0].numel() * tensor.element_size()
            spans.append((start, size))
            start = _rounded(start + size * self.form.experts, PAGE)
        (gate_up, gate_up_size), (down, down_size) = spans
        place = _rounded(gate_up_size, ALIGNED)
        for e in range(self.form.experts):
            self.extents.append((Extent(gate_up + e * gate_up_size, gate_up_size),
                                 Extent(down + e * down_size, down_size, place)))  # fmt: skip
            self._places.append(((0,), (place,)))
        return start

    def _lay_out_packed(self, gate_up: Sequence[Any], down: Sequence[Any], start: int) -> int:
        """The tensors of an expert lie together, so that it is read at once."""
        for pair in zip(gate_up, down, strict=True):
            at, places = start, []
            for product in pair:
                ends = []
                for tensor in pieces(product.packed):
                    ends.append(at - start)
                    self.tensors.append((tensor, at))
                    at = _rounded(at + tensor.numel() * tensor.element_size(), ALIGNED)
                places.append(tuple(ends))
            self._places.append(tuple(places))
            self.extents.append((Extent(start, at - start),))
            start = _rounded(at, PAGE)
        return start

    def move(self, mapping: mmap, module: Any) -> None:
        """Have the tensors lie in the mapped file, and set up the native call."""
        for tensor, offset in self.tensors:
            there = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            tensor.data = there.view(tensor.shape)
        self.let_go(module)
        self._matrices = self._at_home(module)
        gate_up, down = zip(*self._matrices, strict=True)
        form = self.form
        self.kernel = native.NativeExperts(
            dtype=self.dtype,
            hidden=form.hidden,
            inner=form.inner,
            gate=form.gate,
            interleaved=form.interleaved,
            transposed=form.transposed,
            gate_up=gate_up,
            down=down,
        )
        self._state = self._tensor_state()

    def let_go(self, module: Any) -> None:
        """Have packed experts give up the memory that their own call holds, as they do when they are moved."""
        if self.products is not None:
            module._apply(lambda tensor: tensor)

    def _at_home(self, module: Any) -> list[tuple[bytes, bytes]]:
        if self.products is not None:
            half = len(self.products) // 2
            found = [product.packed.matrix(product.bias) for product in self.products]
            return list(zip(found[:half], found[half:], strict=True))
        both = []
        for name in ("gate_up_proj", "down_proj"):
            weights = module._parameters[name].detach()
            biases = module._parameters[f"{name}_bias"].detach() if self.form.biased else [None] * self.form.experts
            both.append([dense_matrix(w, b, self.form.transposed) for w, b in zip(weights, biases, strict=True)])
        return list(zip(*both, strict=True))

    def put(self, expert: int, address: int | None) -> None:
        """Have the native call take an expert from a slot; None: from the mapped file."""
        matrices = self._matrices[expert]
        if address is not None:
            gate_up, down = (
                moved_matrix(matrix, *(address + place for place in places))
                for matrix, places in zip(matrices, self._places[expert], strict=True)
            )
            matrices = gate_up, down
        self.kernel.set(expert, *matrices)

    def written(self) -> set[int]:
        """Return the places in `tensors` of those that lie elsewhere, or were written to, since they were moved."""
        if not self._state:
            return set(range(len(self.tensors)))  # they have not been moved
        return {i for i, (now, then) in enumerate(zip(self._tensor_state(), self._state, strict=True)) if now != then}

    def are_there(self) -> bool:
        """Return whether all tensors lie in the file as they were written to it."""
        return bool(self._state) and self._tensor_state() == self._state

    def is_of(self, module: Any) -> bool:
        """Return whether `module` has these very tensors and computes the same with them."""
        try:
            other = StoredExperts(self.path, module, self.dtype, 0, 0)
        except ValueError:
            return False
        pairs = zip(self.tensors, other.tensors, strict=False)
        return other.form == self.form and all(mine is its for (mine, _), (its, _) in pairs)

    def _tensor_state(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t, _ in self.tensors]


def form_of(module: Any) -> ExpertsForm:
    """Return what a module of stacked or packed experts computes. Raises ValueError with the reason if unknown."""
    return described_experts(module) if packed_products(module) is None else described_packed(module)


def first_tensor(module: Any) -> Tensor | None:
    """Return the tensor by which the experts of a module are known, None if it holds none."""
    products = packed_products(module)
    found: Tensor | None = module._parameters.get("gate_up_proj") if products is None else products[0][0].packed.codes
    return found


def pieces(packed: PackedWeight) -> list[Tensor]:
    """Return the tensors of a packed weight in the order of the fields that describe them to C."""
    found = [packed.codes, packed.scales]
    return found if packed.offsets is None else [*found, packed.offsets]


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to
