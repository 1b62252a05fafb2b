"""Which products are not faster in few bits: small ones, or those that a machine's kernels do not gain on."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from hf_accel.core.steps.setting import Setting
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.targets import targets


@torch.no_grad()
def slower_products(setting: Setting, config: WeightOnlyConfig, rounds: int = 5) -> list[str]:
    """Return the names of products that are not faster in few bits, timed shape by shape at one row.

    The products of a shape take turns, so that their weights come from memory and not from a cache. Looks at the
    replacements that the setting keeps.
    """
    anatomy = setting.anatomy
    shapes: dict[Any, list[Any]] = {}
    for target in targets(anatomy, config)[0]:
        ready = setting.prepared_for(target.module)
        made = next((m for key, m in ready.items() if key[0] == target.scheme), None)
        made = made[0] if isinstance(made, tuple) else made
        if target.scheme is not None and isinstance(made, QuantizedLinear):
            key = (made.in_features, made.out_features, target.scheme)
            shapes.setdefault(key, []).append((target, made))
    found = []
    for (columns, _, _), members in shapes.items():
        x = torch.zeros(1, columns, dtype=anatomy.dtype, device=anatomy.device)
        dense = [member.module for member, _ in members[:8]]
        packed = [made for _, made in members[:8]]
        seconds: dict[str, list[float]] = {"dense": [], "packed": []}
        for _ in range(rounds):
            for name, modules in (("dense", dense), ("packed", packed)):
                start = time.perf_counter()
                for module in modules:
                    module(x)
                seconds[name].append(time.perf_counter() - start)
        if statistics.median(seconds["packed"]) > statistics.median(seconds["dense"]):
            found += [target.path for target, _ in members]
    return found
