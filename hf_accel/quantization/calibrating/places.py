"""Where a decoder layer can be scaled: a norm or a product that is divided, and what reads it multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_accel.core.model.blocks import DecoderBlock
from hf_accel.quantization.calibrating.products import Product


@dataclass(frozen=True)
class Place:
    """Where a layer can be scaled: `source` is divided, the columns of `readers` are multiplied.

    rows: of a product's outputs, those that are divided; None: source is a norm. parent: whose output tells the error.
    """

    source: nn.Module
    rows: slice | None
    readers: tuple[Product, ...]
    parent: nn.Module
    adds_one: bool = False  # the norm multiplies by its weight plus one

    def divided(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new weight of a norm, and the scales [K] that it amounts to in its data type."""
        weight = self.source._parameters["weight"].detach()  # type: ignore[union-attr]
        one = 1.0 if self.adds_one else 0.0
        new = ((weight.float() + one) / scales - one).to(weight.dtype)
        found = (weight.float() + one) / (new.float() + one)
        return new, torch.where(found.isfinite() & (found > 0), found, torch.ones_like(found))


def most_places(blocks: Sequence[DecoderBlock]) -> int:
    """Return in how many places some layers can be scaled, if all of their products are rounded."""
    return sum((block.heads == block.kv_heads) + (3 if block.feed_forward is None else 1) for block in blocks)


def places_of(block: DecoderBlock, products: Sequence[Product], model: nn.Module) -> tuple[list[Place], list[str]]:
    """Return where a decoder layer can be scaled, and why elsewhere not."""
    by_module = {id(product.module): product for product in products}
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found, reasons = [], []
    form, gate, up, down = block.form, block.gate, block.up, block.down
    candidates: list[tuple[nn.Module, slice | None, list[nn.Module], nn.Module]] = []

    def add_norm(name: str, readers: list[nn.Module], parent: nn.Module) -> None:
        norm = block.norm(name)
        if norm is None:
            reasons.append("where products read the residual as it is")
        elif form.norms[name].kind.startswith("layer") or form.norms[name].weight != "weight":
            reasons.append("where a layer norm comes before")
        else:
            candidates.append((norm, None, readers, parent))

    if form.is_parallel:
        reasons.append("where attention and feed-forward part run beside one another")
    else:
        add_norm("input", [part.module for part in block.projections], block.attention)
    if block.heads == block.kv_heads and (v := block.v) is not None:
        candidates.append((v.module, slice(v.start, v.stop), [block.o.module], block.o.module))
    if up is None or down is None:
        reasons.append("where a router and experts read what the norm gives")
    elif not form.is_parallel:
        add_norm("mlp", [part.module for part in (gate, up) if part is not None], up.parent)
    if gate is not None and up is not None and down is not None:
        candidates.append((up.module, slice(up.start, up.stop), [down.module], down.module))
    for source, rows, readers, parent in candidates:
        readers = list(dict.fromkeys(readers))
        rounded = [*readers, *([] if rows is None else [source])]
        if any(id(module) not in by_module for module in rounded):
            reasons.append("where not all of its products are rounded")
        elif any(counts[id(module._parameters["weight"])] > 1 for module in (source, *readers)):
            reasons.append("where weights are shared with another module")
        else:
            chosen = tuple(by_module[id(module)] for module in readers)
            adds_one = rows is None and any(
                n.kind == "rms_unit" for n in form.norms.values() if block.layer.get_submodule(n.path) is source
            )
            found.append(Place(source, rows, chosen, parent, adds_one))
    return found, reasons
