"""How architectures spell heads: which rows of which product are the queries, keys and values of each head.

Products of their own for queries, keys and values say by their shapes what they hold. A fused product does not: nothing
tells one order of rows from another. So the orders are known by the class of the attention module, and a class that is
not in the table is refused rather than misread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = ("Linear", "Conv1D", "FalconLinear")  # exactly these; subclasses compute something else, or hold codes
SEPARATE = ("q_proj", "k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj", "dense")
# normalisations of queries and keys, and the scores of a head that stand beside those of the keys
KNOWN_PARTS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "sinks")


@dataclass(frozen=True)
class Rows:
    """The rows [heads, size] of the child `name` of an attention module, by head."""

    name: str
    rows: Tensor


@dataclass(frozen=True)
class Layout:
    """Where an attention module has its heads: three sets of rows, and the child whose columns are the query heads."""

    q: Rows
    k: Rows
    v: Rows
    o: str
    fixed: str  # why query heads cannot change places; empty when they can

    @property
    def children(self) -> set[str]:
        return {self.q.name, self.k.name, self.v.name, self.o}


Parts = tuple[Tensor, Tensor, Tensor]  # row numbers of queries, keys and values, each [heads, size]


def _blocks(module: Any, heads: int, kv_heads: int, size: int) -> Parts:
    """All queries, then all keys, then all values."""
    counts = (heads, kv_heads, kv_heads)
    rows = torch.arange(sum(counts) * size).split([count * size for count in counts])
    q, k, v = (part.view(-1, size) for part in rows)
    return q, k, v


def _head_by_head(module: Any, heads: int, kv_heads: int, size: int) -> Parts:
    """Of each group its queries, its key and its value: [q k v] of each head, or all queries, the key and the value."""
    rows = torch.arange((heads + 2 * kv_heads) * size).view(kv_heads, heads // kv_heads + 2, size)
    return rows[:, :-2].reshape(heads, size), rows[:, -2], rows[:, -1]


def _bigcode(module: Any, heads: int, kv_heads: int, size: int) -> Parts:
    return (_blocks if module.multi_query else _head_by_head)(module, heads, kv_heads, size)


def _codegen(module: Any, heads: int, kv_heads: int, size: int) -> Parts:
    """Of each shard of the machines it was trained on its queries, its values and its keys."""
    rows = torch.arange(3 * heads * size).view(module.mp_num, 3, heads // module.mp_num, size)
    q, v, k = (rows[:, part].reshape(heads, size) for part in range(3))
    return q, k, v


ALIBI = "each query head has a slope of its own (ALiBi)"


@dataclass(frozen=True)
class Fused:
    """A fused product: its name, the output's, the order of its rows, and the key heads that a module says it has."""

    name: str
    output: str
    order: Callable[[Any, int, int, int], Parts]
    kv_heads: Callable[[Any, int], int] = lambda module, heads: heads
    alibi: Callable[[Any], bool] = lambda config: False


FUSED: dict[str, Fused] = {
    "GPT2Attention": Fused("c_attn", "c_proj", _blocks),
    "GPTBigCodeAttention": Fused("c_attn", "c_proj", _bigcode, lambda module, heads: module.kv_heads),
    "GPTNeoXAttention": Fused("query_key_value", "dense", _head_by_head),
    "PersimmonAttention": Fused("query_key_value", "dense", _head_by_head),
    "BloomAttention": Fused("query_key_value", "dense", _head_by_head, alibi=lambda config: True),
    "FalconAttention": Fused(
        "query_key_value",
        "dense",
        _head_by_head,
        lambda module, heads: module.num_kv_heads,
        lambda config: config.alibi,
    ),
    "MptAttention": Fused("Wqkv", "out_proj", _blocks, alibi=lambda config: True),
    "Phi3Attention": Fused("qkv_proj", "o_proj", _blocks, lambda module, heads: heads // module.num_key_value_groups),
    "CodeGenAttention": Fused("qkv_proj", "out_proj", _codegen),
}


def out_in(product: nn.Module) -> Tensor:
    """Return the weight of a product as a view [outputs, inputs]."""
    weight: Any = product.weight
    return weight.t() if isinstance(product, Conv1D) else weight


def layout_of(module: nn.Module, config: Any) -> Layout:
    """Return where an attention module has its heads; `config` is the model's.

    Raises:
        ValueError: it is not built as anything that is known here; the sentence says what it has.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"its config says num_attention_heads={heads!r}, not one number of heads for all layers")
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.models.")]
    fused = next((FUSED[kind] for kind in kinds if kind in FUSED), None)
    layout = _separate(module, config, heads) if fused is None else _fused(module, fused, config, heads)
    query, key, value = (out_in(module.get_submodule(part.name)) for part in (layout.q, layout.k, layout.v))
    size, kv_heads, value_size = layout.q.rows.shape[1], *layout.v.rows.shape
    stated = getattr(config, "num_key_value_heads", None)
    groups = getattr(module, "num_key_value_groups", None)
    if heads % kv_heads or (isinstance(stated, int) and stated != kv_heads) or groups not in (None, heads // kv_heads):
        raise ValueError(f"it has {kv_heads} key/value heads of size {size}, its config says {stated} for {heads}")
    output = out_in(module.get_submodule(layout.o))
    if output.shape[1] != heads * value_size:
        raise ValueError(f"its {layout.o} reads {output.shape[1]} numbers, not {heads} heads of {value_size}")
    if not query.shape[1] == key.shape[1] == value.shape[1]:
        raise ValueError("its queries, keys and values read inputs of different sizes")
    return layout


def _separate(module: nn.Module, config: Any, heads: int) -> Layout:
    children = module._modules
    output = next((name for name in OUTPUTS if name in children), None)
    if output is None or any(name not in children for name in SEPARATE):
        found = sorted({name.split(".")[0] for name, _ in module.named_parameters()})
        if any(name.startswith("kv_a_proj") for name in found):
            raise ValueError(
                "its keys and values come from one latent vector for all heads (MLA), which is small already"
            )
        raise ValueError(f"its parts are {', '.join(found)}, an order of heads that is not known")
    _check_products(module, {*SEPARATE, output})
    q, k, v = (out_in(children[name]).shape[0] for name in SEPARATE)  # type: ignore[arg-type]
    if q % heads:
        raise ValueError(f"its q_proj has {q} rows, which {heads} heads do not divide")
    size = q // heads
    own = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    if own != size:
        raise ValueError(f"its q_proj has {q} rows for {heads} heads of size {own}")
    if k % size or v % (k // size):
        raise ValueError(f"its k_proj and v_proj have {k} and {v} rows for heads of size {size}")
    rows = (torch.arange(q).view(heads, -1), torch.arange(k).view(-1, size), torch.arange(v).view(k // size, -1))
    q_rows, k_rows, v_rows = (Rows(name, part) for name, part in zip(SEPARATE, rows, strict=True))
    return Layout(q_rows, k_rows, v_rows, output, _fixed(module, size))


def _fused(module: nn.Module, fused: Fused, config: Any, heads: int) -> Layout:
    if getattr(module, "is_cross_attention", False):
        raise ValueError("it attends to another sequence")
    if fused.name not in module._modules or fused.output not in module._modules:
        raise ValueError(f"it has no {fused.name} or no {fused.output}")
    _check_products(module, {fused.name, fused.output})
    kv_heads = fused.kv_heads(module, heads)
    width = out_in(module.get_submodule(fused.name)).shape[0]
    size = width // (heads + 2 * kv_heads)
    if size * (heads + 2 * kv_heads) != width:
        raise ValueError(f"its {fused.name} has {width} rows, not those of {heads} query and 2x {kv_heads} other heads")
    q, k, v = (Rows(fused.name, part) for part in fused.order(module, heads, kv_heads, size))
    return Layout(q, k, v, fused.output, ALIBI if fused.alibi(config) else _fixed(module, size))


def _check_products(module: nn.Module, names: set[str]) -> None:
    for name in sorted(names):
        child = module._modules[name]
        weight: Any = getattr(child, "weight", None)
        if not _is_product(child) or weight is None or weight.dtype not in FLOATS:
            kind = type(child)
            raise ValueError(
                f"its {name} is a {kind.__module__}.{kind.__qualname__}, not a plain product in floating point "
                "(merge adapters first, and convert before quantizing)"
            )
    others = {name.split(".")[0] for name, _ in module.named_parameters()} - names
    if unknown := sorted(others - set(KNOWN_PARTS)):
        raise ValueError(f"it has parts whose meaning for heads is not known: {', '.join(unknown)}")


def _is_product(module: Any) -> bool:
    kind = type(module)
    return kind.__name__ in PRODUCTS and kind.__module__.split(".")[0] in ("torch", "transformers")


def _fixed(module: nn.Module, size: int) -> str:
    for name, parameter in module.named_parameters():
        if name.split(".")[0] not in KNOWN_PARTS:
            continue
        if name == "sinks" or parameter.shape != (size,) or len(name.split(".")) > 2:
            return f"{name} has numbers of its own for each head"
    return ""
