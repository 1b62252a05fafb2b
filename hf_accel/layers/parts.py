"""Shape and weights of a decoder layer as kernels take them: the tensors of its modules, where they lie."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from hf_accel.core.model.blocks import DecoderBlock, LinearSlice
from hf_accel.core.model.discovery.layer import is_product
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedProduct


def native_parts(block: DecoderBlock) -> tuple[native.BlockShape, native.BlockWeights]:
    """Return what a kernel is made of.

    Raises:
        ValueError: a module is no product that can be computed natively.
    """
    form = block.form
    gate, up, down = (None if part is None else _projection(part) for part in (block.gate, block.up, block.down))
    shape = native.BlockShape(
        hidden=block.o.stop,
        heads=form.heads,
        kv_heads=form.kv_heads,
        head_dim=form.head_dim,
        inner=0 if form.up is None else form.up.stop - form.up.start,
        activation=form.activation,
        scale=form.scale,
        q=form.q,
        k=form.k,
        v=form.v,
        gate=form.output_gate,
        softcap=form.softcap,
        residual_scale=form.residual_scale,
        out_scale=form.out_scale,
        is_parallel=form.is_parallel,
        norm_extent=form.norm_extent,
        norms_after_rotary=form.norms_after_rotary,
        rotary=form.rotary,
        rotary_size=None if form.rotary_size in (0, form.head_dim) else form.rotary_size,
        rotates_once=form.rotates_once,
        part="layer" if form.feed_forward is None else "half",
    )
    norms: dict[str, Any] = {f"{name}_norm": _norm(block, name) for name in form.norms if name != "mlp_out" or up}
    weights = native.BlockWeights(
        projections=tuple(map(_projection, block.projections)),
        o=_projection(block.o),
        gate=gate,
        up=up,
        down=down,
        sinks=None if form.sinks is None else getattr(block.attention, form.sinks).detach(),
        **norms,
    )
    return shape, weights


def _projection(part: LinearSlice) -> native.Projection:
    module: Any = part.module
    bias = None if module.bias is None else module.bias.detach()[part.start : part.stop]
    if isinstance(module, PackedProduct):
        return native.Projection(module.packed.slice(part.start, part.stop), bias)
    if not is_product(module):
        raise ValueError(f"a {type(module).__name__} is no product that runs natively")
    weight: torch.Tensor = module.weight.detach()
    weight = weight.t() if isinstance(module, Conv1D) else weight
    return native.Projection(weight[part.start : part.stop], bias)


def lies_transposed(block: DecoderBlock) -> bool:
    """Return whether weights of a layer lie as GPT-2's `Conv1D` has them, [K, N], and not packed."""
    return any(isinstance(module, Conv1D) and not isinstance(module, PackedProduct) for module in block.modules)


def _norm(block: DecoderBlock, name: str) -> native.Norm:
    form, module = block.form.norms[name], block.norm(name)
    weight, bias = (None if held is None else getattr(module, held).detach() for held in (form.weight, form.bias))
    return native.Norm(kind=form.kind, eps=form.eps, weight=weight, bias=bias)
