"""The experts of a layer in GGUF files: gate, up and down of all of them as three tensors [experts, rows, columns].

Here gate and up are one product, rows of gate above those of up, so their blocks are put below one another: rows of
blocks, none of them opened. Cost: the blocks of one expert.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_accel.core.model.experts import ExpertsLayout, layout_of
from hf_accel.quantization.files.filling import Filler
from hf_accel.quantization.gguf.reader import Entry, GgufFile
from hf_accel.quantization.gguf.types import DENSE, dense, packed
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear

_LAYER = re.compile(r"\.layers\.(\d+)\.")
PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}


class Reads(Protocol):
    """Who reads a file: it hears of each packed weight."""

    file: GgufFile
    dtype: torch.dtype

    def took(self, entry: Entry, error: float) -> None: ...


def tensor_names(layers: int) -> list[str]:
    """Return the names in a file of all that belongs to experts."""
    parts = [part for group in PARTS.values() for part in group]
    return [
        f"blk.{layer}.ffn_{part}_exps.{kind}"
        for layer in range(layers)
        for part in parts
        for kind in ("weight", "bias")
    ]


def replace_experts(reads: Reads, filler: Filler, name: str, module: nn.Module) -> None:
    """Put packed experts in the place of the module called `name`, or values into it where the file holds values.

    Raises:
        CheckpointError: their layout is not known, or a tensor is missing, of another shape, or gate and up are of two
            types, or some are values and some are packed.
    """
    layer = _LAYER.search(f".{name}.")
    try:
        layout = layout_of(module)
        if layer is None:
            raise ValueError("it is part of no layer")
    except ValueError as error:
        raise reads.file.damaged(f"the experts {name} cannot be packed here, for {error}") from error
    shapes = {"gate": (layout.inner, layout.hidden), "up": (layout.inner, layout.hidden)}
    shapes["down"] = (layout.hidden, layout.inner)
    lists: list[list[QuantizedLinear]] = []
    for product, parts in PARTS.items():
        stems = [f"blk.{layer[1]}.ffn_{part}_exps" for part in parts]
        wanted = [(layout.experts, *shapes[part]) for part in parts]
        entries = [_entry(reads.file, f"{stem}.weight", shape) for stem, shape in zip(stems, wanted, strict=True)]
        if len({entry.type for entry in entries}) > 1:
            raise reads.file.damaged(f"{stems[0]} and {stems[-1]} are of two types; a product has one here")
        biases = [_bias(reads, f"{stem}.bias", shape[:2]) for stem, shape in zip(stems, wanted, strict=True)]
        blocks = [reads.file.blocks(entry) for entry in entries]
        if entries[0].type in DENSE:
            values = [dense(entry, some).to(reads.dtype) for entry, some in zip(entries, blocks, strict=True)]
            _fill(module, layout, product, values, biases)
            filler.filled |= {f"{name}.{product}_proj", f"{name}.{product}_proj_bias"}
            continue
        rows = sum(shape[1] for shape in wanted)
        described = Entry(entries[0].name, (rows, wanted[0][2]), entries[0].type, 0, 0)
        products = []
        for index in range(layout.experts):
            found = packed(described, torch.cat([part[index] for part in blocks]))
            bias = torch.cat([part[index] for part in biases]) if layout.biased else None
            products.append(QuantizedLinear(found.weight, bias, reads.dtype))
            reads.took(described, found.error)
        for entry in entries:
            reads.file.release(entry)
        lists.append(products)
    if not lists:
        return
    if len(lists) < len(PARTS):
        raise reads.file.damaged(
            f"of the experts {name} some are packed and some are values; they are packed as one here"
        )
    gate_up, down = lists
    experts = QuantizedExperts(gate_up, down, module)
    filler.put(name, experts)
    filler.filled |= {f"{name}.{own}" for own, _ in experts.named_parameters()}


def _fill(module: Any, layout: ExpertsLayout, product: str, values: list[Tensor], biases: list[Tensor]) -> None:
    """Put the values of a product of all experts, [experts, rows, columns] each part, into the module's parameters."""

    def joined(parts: list[Tensor]) -> Tensor:
        if len(parts) > 1 and layout.interleaved:
            return torch.stack(parts, dim=2).flatten(1, 2)
        return torch.cat(parts, dim=1)

    weight = joined(values)
    found = {f"{product}_proj": weight.mT.contiguous() if layout.transposed else weight}
    if layout.biased:
        found[f"{product}_proj_bias"] = joined(biases)
    for name, tensor in found.items():
        module._parameters[name] = nn.Parameter(tensor, requires_grad=module._parameters[name].requires_grad)


def _entry(file: GgufFile, name: str, shape: tuple[int, ...]) -> Entry:
    entry = file.tensors.get(name)
    if entry is None:
        raise file.damaged(f"it lacks the tensor {name}; the file is not complete")
    if entry.shape != shape:
        raise file.damaged(f"the tensor {name}: its shape is {entry.shape}; the metadata ask for {shape}")
    return entry


def _bias(reads: Reads, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in reads.file.tensors:
        return torch.zeros(shape, dtype=reads.dtype)
    entry = _entry(reads.file, name, shape)
    return dense(entry, reads.file.blocks(entry)).to(reads.dtype, copy=True)
