"""Blocks of a cache for tests of its tiers."""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.cache.tiers.tiers import Tiers

CPU = torch.device("cpu")
KINDS = [torch.bfloat16, torch.uint8, torch.float32]
# per layer: heads, tokens, key and value sizes; row bytes that are and are not multiples of 8
SHAPES = [(2, 4, 8, 8), (1, 4, 6, 10), (3, 4, 5, 1)]


def block(batch: int, shape: tuple[int, int, int, int], seed: int, dtypes: Any = (torch.float32, torch.float32)) -> Any:
    heads, tokens, *sizes = shape
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for size, dtype in zip(sizes, dtypes):
        raw = torch.randint(0, 256, (batch, heads, tokens, size * dtype.itemsize), generator=generator).to(torch.uint8)
        pair.append(raw.view(dtype))
    return tuple(pair)


def same(found: Any, expected: Any) -> bool:
    """Return whether two pairs are equal in every bit, NaN included."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(found, expected)
    )


def size_of(pair: Any) -> int:
    return sum(part.numel() * part.element_size() for part in pair)


def filled(layers: int = 2, blocks: int = 4, **options: Any) -> tuple[Tiers, list[list[Any]]]:
    """Return tiers and what was put: all on the disk unless options say otherwise."""
    size = size_of(block(2, SHAPES[0], 0))
    tiers = Tiers(CPU, **{"store": "disk", "near_budget_bytes": 2 * size, **options})
    pairs = [[block(2, SHAPES[0], 100 * layer + i) for i in range(blocks)] for layer in range(layers)]
    for i in range(blocks):
        for layer in range(layers):
            tiers.put(layer, *pairs[layer][i])
    return tiers, pairs


def expect(tiers: Tiers, pairs: list[list[Any]]) -> None:
    for layer, expected in enumerate(pairs):
        found = 0
        for pair, wanted in zip(tiers.read(layer), expected, strict=True):
            assert same(pair, wanted)
            found += 1
        assert found == len(expected)
