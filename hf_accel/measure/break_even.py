"""From how many tokens on attention over a quantized cache takes less time than over keys and values as they are.

One step of one token is timed over a layer's cache of growing length, both ways in alternation; the rest of the step
is the same. Cost: some tenths of a second and the memory of one layer's cache of the longest length, twice.
"""

from __future__ import annotations

import statistics
import time

import torch

from hf_accel.kernels import native
from hf_accel.ops import cached

LENGTHS = (512, 2048, 8192)
ROUNDS = 7
GAIN = 1.05  # less cannot be told from noise


def break_even(
    heads: int,
    kv_heads: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    lengths: tuple[int, ...] = LENGTHS,
) -> int | None:
    """Return the least of `lengths` from which on codes of `bits` gain at least 5 %; None: not up to the longest.

    Args:
        heads, kv_heads: H and G. sizes: head sizes of keys and values. dtype: of keys and values as they are.

    Raises:
        RuntimeError: the native kernels are not available: without them codes are decoded at every step.
    """
    longest = max(lengths)
    plain = [torch.randn(1, kv_heads, longest, size).to(dtype) for size in sizes]
    coded = [cached.encode(states, bits, is_key=part == 0) for part, states in enumerate(plain)]
    query = torch.randn(1, heads, 1, sizes[0]).to(dtype)

    def step(tokens: int, kept: list[torch.Tensor], bits: int | None) -> float:
        keys, values = (part[:, :, :tokens] for part in kept)
        start = time.perf_counter()
        native.attend(query, keys, values, sizes, scale=1.0, bits=bits)
        return time.perf_counter() - start

    found = None
    for tokens in sorted(lengths, reverse=True):
        times = [(step(tokens, plain, None), step(tokens, coded, bits)) for _ in range(ROUNDS)]
        as_it_is, codes = (statistics.median(each) for each in zip(*times, strict=True))
        if as_it_is < GAIN * codes:
            break
        found = tokens
    return found
