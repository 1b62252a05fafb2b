"""Attention of up to 16 new tokens over a static cache, on a GPU: keys and values are read once, as far as rows are.

Flash-decoding (Dao et al. 2023): the visible columns of a row are shared out over a fixed number of splits, so that the
grid depends on the size of the buffers alone and a captured graph serves all lengths: each program reads its row's
length and start on the device, takes an equal share of what lies between, in whole tiles, and leaves at once where none
is left for it. The queries of all heads of a group and of all tokens are the rows of one tile (at least 16, for tensor
cores). A second launch merges the splits. Codes of 8 and 4 bits (`hf_accel.ops.cached`) are multiplied as they are, as
whole numbers; scales multiply scores and weights. Twin: `hf_accel.ops.static_attention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from hf_accel.kernels.triton import on_its_device, tuning
from hf_accel.kernels.triton.attention_splits import merge, split_keys

MAX_TOKENS = 16
_MAGIC = {None: 0, 8: 0x4B000000, 4: 0x43434343}  # see `attention_splits`


@on_its_device
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    starts: Tensor,
    *,
    scale: float,
    bits: int | None = None,
    head_dims: tuple[int, int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return softmax(scale · q kᵀ) v [B, H, T, Dv], on memory [B, T, H, Dv] in one piece.

    query [B, H, T, D], T from 1 to 16, the last dimension in one piece; keys, values: buffers [B, G, C, D] and
    [B, G, C, Dv] with rows next to one another, or rows of codes, uint8, with `bits` 8 or 4 and `head_dims` (D, Dv);
    lengths, starts int32 [B] on the device: query t of row b sees columns c with
    max(starts[b], lengths[b] + t - window + 1) <= c <= lengths[b] + t. sinks [H]: one more logit each, without a value.
    A query that sees nothing gets zeros.
    """
    batch, query_heads, tokens, size = query.shape
    groups, capacity = keys.shape[1:3]
    size_v = values.shape[3] if head_dims is None else head_dims[1]
    ratio = query_heads // groups
    block_m, tiles = _tiles(query, groups)
    if config is None:
        key = _key(query, keys, bits)
        default = defaults(batch * groups * tiles, capacity, size, bits, query)
        config = tuning.chosen("attention", query.device, query.dtype, key, default)
    splits = max(1, min(config["SPLITS"], -(-capacity // config["BLOCK_N"])))
    splits = max(splits, 2) if sinks is not None else splits
    out = torch.empty(batch, tokens, query_heads, size_v, dtype=query.dtype, device=query.device)
    places = batch * query_heads * tokens
    parts = places * splits
    kept = torch.empty(parts * (2 + size_v if splits > 1 else 2), dtype=torch.float32, device=query.device)
    partial, tops, sums = kept[: -2 * parts], kept[-2 * parts : -parts], kept[-parts:]
    key_halves, value_halves = keys, values
    if bits is not None:
        key_halves, value_halves = keys.view(torch.bfloat16), values.view(torch.bfloat16)
        if bits == 8:
            keys, values = keys.view(torch.int8), values.view(torch.int8)
    divided = 2 if bits == 4 else 1
    power = size & -size
    split_keys[(splits, groups * tiles, batch)](
        query, keys, values, key_halves, value_halves, lengths, starts, out, partial, tops, sums,
        query.stride(0), query.stride(1), query.stride(2),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        ratio, tokens, groups, scale, softcap or 1.0, window or 0, _MAGIC[bits],
        SIZE=size, SIZE_V=size_v, ROW=keys.stride(2), ROW_V=values.stride(2), BITS=bits or 0,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, POWER=power, ROOT=1.0 / math.sqrt(power),
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32", SPLITS=splits, TILES=tiles, BLOCK_M=block_m,
        BLOCK_D=max(16, triton.next_power_of_2(size // divided)),
        BLOCK_V=max(16, triton.next_power_of_2(size_v // divided)),
        BLOCK_N=config["BLOCK_N"], num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if splits > 1:
        merge[(places,)](
            partial, tops, sums, query if sinks is None else sinks, out, tokens, query_heads,
            SIZE_V=size_v, BLOCK_V=triton.next_power_of_2(size_v), SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits), HAS_SINKS=sinks is not None, num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)


def _tiles(query: Tensor, groups: int) -> tuple[int, int]:
    """Return the rows of a tile of queries, and the tiles of a group."""
    rows = query.shape[1] // groups * query.shape[2]
    block = max(16, min(64, triton.next_power_of_2(rows)))
    return block, -(-rows // block)


def _key(query: Tensor, keys: Tensor, bits: int | None) -> tuple[Any, ...]:
    batch, groups, capacity = keys.shape[:3]
    return batch, groups, _tiles(query, groups)[0], query.shape[3], bits or 0, capacity.bit_length()


def tune(
    query: Tensor, keys: Tensor, values: Tensor, bits: int | None, head_dims: tuple[int, int]
) -> tuning.Config | None:
    """Return the fastest configuration for buffers that are filled by half, and keep it for this device."""
    batch, groups, capacity = keys.shape[:3]
    lengths = torch.full((batch,), (capacity - query.shape[2]) // 2, dtype=torch.int32, device=query.device)
    starts = torch.zeros_like(lengths)

    def seconds(config: tuning.Config) -> float:
        def call() -> None:
            decode_attention(
                query, keys, values, lengths, starts, scale=1.0, bits=bits, head_dims=head_dims, config=config
            )

        return tuning.seconds_of(call, query.device)

    tried = candidates(batch * groups * _tiles(query, groups)[1], query.shape[3], query)
    return tuning.tune("attention", query.device, query.dtype, _key(query, keys, bits), tried, seconds)


def defaults(tiles: int, capacity: int, size: int, bits: int | None, query: Tensor) -> tuning.Config:
    """Return the configuration that runs untuned, for `tiles` tiles of queries: two programs per processor."""
    block = 64 if size <= 128 and query.element_size() < 4 else 32
    # programs over codes do more for every byte, and take less memory: more of them hide each other's waiting
    wanted = max(1, (2 if bits is None else 6) * _processors(query.device) // tiles)
    return {"BLOCK_N": block, "SPLITS": 1 << (wanted.bit_length() - 1), "num_warps": 4,
            "num_stages": 3 if size <= 128 else 2}  # fmt: skip


def candidates(tiles: int, size: int, query: Tensor) -> list[tuning.Config]:
    """Return the configurations that tuning tries."""
    processors = _processors(query.device)
    splits = sorted({max(1, factor * processors // tiles) for factor in (1, 2, 4)})
    return [
        {"BLOCK_N": block, "SPLITS": split, "num_warps": warps, "num_stages": stages}
        for split in splits
        for block, warps, stages in ((32, 2, 4), (64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 3))
    ]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
