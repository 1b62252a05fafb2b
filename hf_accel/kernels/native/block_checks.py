"""Whether the native kernels can take a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.kernels.native.attend import MAX_HEAD_DIM
from hf_accel.kernels.native.block_weights import (
    ACTIVATIONS,
    MAX_PROJECTIONS,
    NORM_EXTENTS,
    NORM_KINDS,
    PARTS,
    ROTARIES,
    BlockShape,
    BlockWeights,
    Heads,
    Projection,
)
from hf_accel.kernels.native.linear import DTYPE_CODES

_HEAD_NORMS = ("q_norm", "k_norm", "v_norm")


def is_transposed(weight: Tensor) -> bool:
    """Whether a weight [N, K] lies as [K, N], with rows of these in one piece."""
    return weight.stride(-1) != 1 and weight.stride(0) == 1


def checked_dtype(shape: BlockShape, weights: BlockWeights) -> torch.dtype:
    """Return the dtype of the weights. Raises: ValueError naming what the native block does not take."""
    _check_shape(shape)
    _check_parts(shape, weights)
    dtype = _dtype(weights)
    for name, product, size in _sizes(shape, weights):
        if isinstance(product.weight, Tensor):
            _check_tensor(f"{name}.weight", product.weight, size, dtype, may_be_transposed=True)
        elif tuple(product.weight.shape) != size:
            raise ValueError(f"{name}.weight has shape {tuple(product.weight.shape)}; the block asks for {size}")
        else:
            product.weight.check()
        if product.bias is not None:
            _check_tensor(f"{name}.bias", product.bias, size[:1], dtype)
    for name, norm in weights.norms.items():
        if norm.kind not in NORM_KINDS:
            raise ValueError(f"the kind of {name}, {norm.kind!r}, is not one of {', '.join(NORM_KINDS)}")
        if norm.bias is not None and not norm.kind.startswith("layer"):
            raise ValueError(f"{name} has a bias, which only norms of the kinds 'layer' and 'layer_unit' have")
        for part, tensor in (("weight", norm.weight), ("bias", norm.bias)):
            if tensor is not None:
                _check_tensor(f"{name}.{part}", tensor, _norm_size(name, shape), dtype)
                if not tensor.is_contiguous():
                    raise ValueError(f"{name}.{part} has strides {tensor.stride()}; it must be contiguous")
    for name, tensor, kind in (("sinks", weights.sinks, dtype), ("slopes", weights.slopes, torch.float32)):
        if tensor is not None:
            is_f32 = tensor.dtype == torch.float32
            _check_tensor(name, tensor, (shape.heads,), torch.float32 if is_f32 else kind)
    return dtype


def _dtype(weights: BlockWeights) -> torch.dtype:
    dense = [product.weight.dtype for product in weights.products.values() if isinstance(product.weight, Tensor)]
    tensors = [*(norm.weight for norm in weights.norms.values()), *(p.bias for p in weights.products.values())]
    found = dense + [tensor.dtype for tensor in tensors if tensor is not None]
    if not found:
        raise ValueError("nothing says the layer's dtype: all products are packed, without norms and biases")
    first = next((norm.weight.dtype for norm in weights.norms.values() if norm.weight is not None), found[0])
    if first not in DTYPE_CODES:
        raise ValueError(f"weights have dtype {first}; the native block takes bfloat16, float16 and float32")
    return first


def _check_shape(shape: BlockShape) -> None:
    for name, value, known in (
        ("activation", shape.activation, ACTIVATIONS),
        ("norm_extent", shape.norm_extent, NORM_EXTENTS),
        ("rotary", shape.rotary, ROTARIES),
        ("part", shape.part, PARTS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
    if not 1 <= shape.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {shape.head_dim}; the native block takes 1 to {MAX_HEAD_DIM}")
    if shape.kv_heads < 1 or shape.heads < 1 or shape.heads % shape.kv_heads:
        raise ValueError(f"heads ({shape.heads}) must be a multiple of kv_heads ({shape.kv_heads})")
    if shape.softcap is not None and not shape.softcap > 0:
        raise ValueError(f"softcap is {shape.softcap}; it must be positive, or None for no soft cap")
    size = shape.rotary_size
    if size is not None and (not 0 < size <= shape.head_dim or size % 2):
        raise ValueError(f"rotary_size is {size}; it must be even and at most the head_dim {shape.head_dim}")
    if (shape.k is None) != (shape.v is None):
        raise ValueError("a block has k and v, or neither")
    if shape.is_parallel and shape.part != "layer":
        raise ValueError(
            f"a parallel layer has no part {shape.part!r}: its feed-forward part does not read the residual"
        )


def _check_parts(shape: BlockShape, weights: BlockWeights) -> None:
    if not 1 <= len(weights.projections) <= MAX_PROJECTIONS:
        raise ValueError(f"a block has 1 to {MAX_PROJECTIONS} projections, got {len(weights.projections)}")
    has_mlp = shape.part == "layer"
    if (
        (weights.up is not None) != has_mlp
        or (weights.down is not None) != has_mlp
        or (weights.gate is not None and not has_mlp)
    ):
        raise ValueError(f"a part {shape.part!r} has {'up and down' if has_mlp else 'no gate, up and down'}")
    if shape.part == "half" and (weights.mlp_out_norm is not None or shape.out_scale != 1.0):
        raise ValueError("half a layer has no mlp_out_norm and no out_scale: its feed-forward part is elsewhere")
    more = {"mlp_norm", "attention_out_norm", "mlp_out_norm"} & weights.norms.keys()
    if shape.part == "attention" and (more or shape.residual_scale != 1.0 or shape.out_scale != 1.0):
        raise ValueError(
            f"attention alone has no residual, so no {', '.join(sorted(more)) or 'scale of what joins it'}"
        )
    if weights.slopes is not None and (shape.softcap is not None or weights.sinks is not None):
        raise ValueError("slopes go with no softcap and no sinks")
    if shape.k is None and (weights.k_norm is not None or weights.v_norm is not None):
        raise ValueError("a block without k and v has no k_norm and no v_norm")
    rows = sum(projection.weight.shape[0] for projection in weights.projections)
    for name in ("q", "k", "v", "gate"):
        heads: Heads | None = getattr(shape, name)
        if heads is not None:
            _check_heads(name, heads, shape, rows, is_normed=f"{name}_norm" in weights.norms)
    if shape.norm_extent == "row":
        if shape.norms_after_rotary and weights.norms.keys() & {*_HEAD_NORMS}:
            raise ValueError("norms over a whole row come before the rotary")
        if shape.k is not None and shape.k == shape.v and weights.k_norm is not None:
            raise ValueError("values are where keys are, which a norm over the whole row would change")


def _check_heads(name: str, heads: Heads, shape: BlockShape, rows: int, *, is_normed: bool) -> None:
    group = shape.heads // shape.kv_heads if name in ("q", "gate") else 1
    starts = [heads.start + g * heads.stride + i * heads.step for g in (0, shape.kv_heads - 1) for i in (0, group - 1)]
    if min(starts) < 0 or max(starts) + shape.head_dim > rows:
        raise ValueError(f"{name} lies at {heads}, beyond a projected row of {rows}")
    is_row = (group == 1 or heads.step == shape.head_dim) and (
        shape.kv_heads == 1 or heads.stride == group * shape.head_dim
    )
    if is_normed and shape.norm_extent == "row" and not is_row:
        raise ValueError(f"the heads of {name} do not lie side by side, as a norm over the whole row asks for")


def _sizes(shape: BlockShape, weights: BlockWeights) -> list[tuple[str, Projection, tuple[int, int]]]:
    """Return each product with the size that its weight must have."""
    e, i, q = shape.hidden, shape.inner, shape.heads * shape.head_dim
    own = {"o": (weights.o.weight.shape[0] if shape.part == "attention" else e, q)}
    own |= {"gate": (i, e), "up": (i, e), "down": (e, i)}
    return [(name, product, own.get(name, (product.weight.shape[0], e))) for name, product in weights.products.items()]


def _norm_size(name: str, shape: BlockShape) -> tuple[int, ...]:
    if name not in _HEAD_NORMS:
        return (shape.hidden,)
    heads = shape.heads if name == "q_norm" else shape.kv_heads
    sizes = {"head": (shape.head_dim,), "heads": (heads, shape.head_dim), "row": (heads * shape.head_dim,)}
    return sizes[shape.norm_extent]


def _check_tensor(
    name: str, tensor: Tensor, size: tuple[int, ...], dtype: torch.dtype, *, may_be_transposed: bool = False
) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} lies on {tensor.device}; the native block runs on the CPU")
    if tensor.dtype != dtype:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, the other weights {dtype}: the native block takes one dtype"
        )
    if tuple(tensor.shape) != size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the block's sizes ask for {size}")
    if tensor.stride(-1) != 1 and not (may_be_transposed and is_transposed(tensor)):
        raise ValueError(f"{name} has strides {tensor.stride()}; one of a weight must be 1, of other tensors the last")
    last = tensor.storage_offset() + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    if not tensor.data_ptr() or (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"the memory of {name} has been given up")
