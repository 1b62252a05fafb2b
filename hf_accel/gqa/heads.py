"""The projections of attention by head: found in a model, read from it and written into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.model.support import check_supported
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.gqa.layouts import Rows, layout_of, out_in


@dataclass
class Heads:
    """The projections of one attention layer by head, in the layer's own dtype or whichever given.

    H query heads, G key/value heads, D head size, Dv size of a value head, E hidden size. The query heads h of the
    group g are g * H/G to (g + 1) * H/G - 1. A bias is None where the product has none.
    """

    q: Tensor  # [H, D, E]
    k: Tensor  # [G, D, E]
    v: Tensor  # [G, Dv, E]
    o: Tensor  # [E, H, Dv], the output projection: columns by query head
    q_bias: Tensor | None = None  # [H, D]
    k_bias: Tensor | None = None  # [G, D]
    v_bias: Tensor | None = None  # [G, Dv]
    o_bias: Tensor | None = None  # [E]


@dataclass(frozen=True)
class AttentionLayer:
    """A self-attention module: the child `name` of `parent`, and how many of its kind stand before it."""

    parent: nn.Module
    name: str
    module: nn.Module
    index: int
    path: str  # dotted, from the model
    heads: int
    kv_heads: int
    fixed: str  # a sentence on why query heads cannot change places; empty when they can
    products: frozenset[str]  # names of the module's children that read_heads reads


def attention_layers(model: Any) -> list[AttentionLayer]:
    """Return every self-attention module of a decoder, first to last.

    Raises:
        UnsupportedModelError: it is no plain text model, or a module of it attends and is built in a way that is not
            known here (latent attention, gated queries, keys of other layers); the message names the module.
    """
    check_supported(model)
    if model.config.get_text_config(decoder=True) is not model.config:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads more than text; key and value heads are converted in plain text models. "
            "Take the language model out of it first."
        )
    return layers_of(model)


def layers_of(model: Any) -> list[AttentionLayer]:
    """Return the self-attention modules of a plain text model, which may be on the meta device.

    Raises:
        UnsupportedModelError: as attention_layers.
    """
    config = model.config
    found: list[AttentionLayer] = []
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        if not _attends(module):
            continue
        try:
            layout = layout_of(module, config)
        except ValueError as error:
            refused[path] = f"{path} is a {type(module).__name__}: {error}"
            continue
        parent, _, name = path.rpartition(".")
        heads, kv_heads = layout.q.rows.shape[0], layout.k.rows.shape[0]
        names = frozenset(layout.children)
        place = (model.get_submodule(parent), name, module, len(found), path)
        found.append(AttentionLayer(*place, heads, kv_heads, layout.fixed, names))
    holders = {path for path in refused for layer in found if layer.path.startswith(f"{path}.")}  # hold what was found
    for path in refused:
        if path not in holders:
            raise UnsupportedModelError(
                f"The heads of {type(model).__name__} cannot be read: {refused[path]}. hf_accel does not convert it."
            )
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no self-attention; there are no heads to convert.")
    return found


def _attends(module: nn.Module) -> bool:
    """Return whether a module is, by its name or its children, attention with weights."""
    is_named = "Attention" in type(module).__name__
    has_parts = {"q_proj", "k_proj", "v_proj"} <= module._modules.keys()
    return (is_named or has_parts) and next(module.parameters(), None) is not None


def read_heads(layer: AttentionLayer, config: Any) -> Heads:
    """Return copies of the projections of a layer by head: what is read can be changed and written back."""
    layout = layout_of(layer.module, config)
    (q, q_bias), (k, k_bias), (v, v_bias) = (_read(layer.module, part) for part in (layout.q, layout.k, layout.v))
    output: Any = layer.module.get_submodule(layout.o)
    o = out_in(output).detach().clone().unflatten(1, (len(layout.q.rows), layout.v.rows.shape[1]))
    return Heads(q, k, v, o, q_bias, k_bias, v_bias, None if output.bias is None else output.bias.detach().clone())


def _read(module: nn.Module, part: Rows) -> tuple[Tensor, Tensor | None]:
    product: Any = module.get_submodule(part.name)
    rows = part.rows.to(product.weight.device)
    return out_in(product).detach()[rows], None if product.bias is None else product.bias.detach()[rows]


def write_heads(layer: AttentionLayer, config: Any, heads: Heads) -> None:
    """Write projections into the parameters of a layer, rounded to their dtype; no bias is a bias of zeros.

    Raises:
        ConfigError: shapes are not the layer's, or a bias has no place in it. Nothing is written then.
    """
    layout = layout_of(layer.module, config)
    for check in (True, False):
        for part, values, bias in (
            (layout.q, heads.q, heads.q_bias),
            (layout.k, heads.k, heads.k_bias),
            (layout.v, heads.v, heads.v_bias),
        ):
            product: Any = layer.module.get_submodule(part.name)
            weight, rows = out_in(product).detach(), part.rows.to(product.weight.device)
            if check:
                _check(f"{layer.path}.{part.name}", (*rows.shape, weight.shape[1]), product, values, bias)
            else:
                weight[rows] = values.to(weight)
                _write_bias(product, rows, bias)
        output: Any = layer.module.get_submodule(layout.o)
        shape = (output_size := len(out_in(output)), len(layout.q.rows), layout.v.rows.shape[1])
        if check:
            _check(f"{layer.path}.{layout.o}", shape, output, heads.o, heads.o_bias, (output_size,))
        else:
            out_in(output).detach().copy_(heads.o.flatten(1))
            _write_bias(output, torch.arange(output_size, device=output.weight.device), heads.o_bias)


def _check(
    name: str, shape: tuple[int, ...], product: Any, values: Tensor, bias: Tensor | None, own: tuple[int, ...] = ()
) -> None:
    if tuple(values.shape) != shape:
        raise ConfigError(f"{name} holds heads of the shape {list(shape)}; it was given {list(values.shape)}.")
    if bias is not None and product.bias is None:
        raise ConfigError(f"{name} has no bias; it was given one of the shape {list(bias.shape)}.")
    if bias is not None and tuple(bias.shape) != (own or shape[:-1]):
        raise ConfigError(f"The bias of {name} has the shape {list(own or shape[:-1])}, not {list(bias.shape)}.")


def _write_bias(product: Any, rows: Tensor, bias: Tensor | None) -> None:
    if product.bias is not None:
        product.bias.detach()[rows] = 0 if bias is None else bias.to(product.bias)
