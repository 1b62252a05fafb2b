"""How many tokens move together between the tiers of a cache, and what of the budgets is left for blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.cache.buffers import MINIMUM_TOKENS
from hf_accel.cache.codec import Codec
from hf_accel.cache.config import KVCacheConfig
from hf_accel.cache.probing import LayerShape
from hf_accel.errors import ConfigError

SMALLEST, LARGEST = 16, 4096  # tokens of a block
BLOCK_BYTES = 1 << 20  # of a block where no budget says otherwise: a disk reads as much at once at full speed


@dataclass(frozen=True)
class Division:
    """How a call's budgets are spent.

    block_tokens: how many tokens move together.
    hot_bytes: what the layers' own buffers take.
    near_bytes: what is left of the device's budget, for blocks and for two buffers to read them into.
    cpu_bytes: what blocks may take of CPU memory, None: no limit.
    """

    block_tokens: int
    hot_bytes: int
    near_bytes: int
    cpu_bytes: int | None


def divide(
    config: KVCacheConfig, codec: Codec, shapes: list[LayerShape], rows: int, tokens: int, device: torch.device
) -> Division:
    """Divide the budgets of `config` for `rows` rows of up to `tokens` tokens.

    Raises:
        ConfigError: they do not hold the smallest blocks; the message says what would be needed.
    """
    each = [rows * codec.bytes_per_token(s.kv_heads, s.sizes, s.dtypes[0]) for s in shapes]
    full = [size for size, shape in zip(each, shapes, strict=True) if shape.window is None]
    # windows stay where they are; their buffers hold twice the window at most
    windows = [(size, shape.window) for size, shape in zip(each, shapes, strict=True) if shape.window]
    fixed = sum(size * max(MINIMUM_TOKENS, min(tokens, 2 * window)) for size, window in windows)
    budget, cpu = config.device_budget_bytes, config.cpu_budget_bytes
    if device.type == "cpu" and cpu is not None:
        # both budgets are of one memory and add up; a sum of 0 bytes means "as few as will do", as None does
        budget, cpu = (budget or 0) + cpu or None, 0
    sizes = [n for n in (1 << i for i in range(4, 13)) if n == SMALLEST or n < tokens]

    def need(block_tokens: int) -> int:
        return fixed + 2 * block_tokens * (sum(full) + max(full, default=0))

    if budget is not None and need(SMALLEST) > budget:
        held = [f"{len(windows)} layers with a window"] if windows else []
        if full:
            held.append(f"{len(full)} layers with two blocks of {SMALLEST} tokens each, and two to read into")
        raise ConfigError(
            f"The cache may hold {budget:,} bytes of {device.type} memory, but {' and '.join(held)}, of {rows} rows, "
            f"take {need(SMALLEST):,} bytes. Raise device_budget_bytes to that or more, or make the batch smaller."
        )
    if not full:
        return Division(LARGEST, fixed, 0, cpu)
    if budget is None:
        block = max((n for n in sizes if n * max(full) <= BLOCK_BYTES), default=SMALLEST)
        return Division(block, need(block) - 2 * block * max(full), 2 * block * max(full), cpu)
    block = max((n for n in sizes if 2 * need(n) <= budget), default=SMALLEST)
    hot = need(block) - 2 * block * max(full)
    return Division(block, hot, budget - hot, cpu)
