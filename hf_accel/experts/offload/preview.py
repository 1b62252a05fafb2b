"""What a budget will cost, before anything is moved: the routing of some text, and the slots over it without weights.

Cost: a pass over the text, on a copy that shares the model's tensors, and some 20 µs per token and layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.statistics import concentration, said
from hf_accel.experts.offload.stored import StoredExperts
from hf_accel.measure.quality import CalibrationText
from hf_accel.measure.text import calibration_text

MOST_TOKENS = 2048  # of the text


@dataclass(frozen=True)
class OffloadPreview:
    """The expected share of experts that a token finds in memory, and the share that carries 90 % of the routing.

    budget_bytes and experts_bytes: as the weights are now, before other steps put them in few bits.
    """

    budget_bytes: int
    experts_bytes: int
    hit_rate: float
    concentration: float
    tokens: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"budget {self.budget_bytes / 1e6:.1f} of {self.experts_bytes / 1e6:.1f} MB of experts: "
            f"{self.hit_rate:.1%} of what a token wants is in memory, on {self.tokens} tokens of {self.source}; "
            f"{said(self.concentration, self.budget_bytes / self.experts_bytes)}"
        )


class _Still:
    """Experts of one layer in the place of `StoredExperts`, with a byte for each `unit` of theirs."""

    def __init__(self, stored: StoredExperts, unit: int) -> None:
        self.first, self.bytes_of = stored.first, [size // unit for size in stored.bytes_of]

    def put(self, expert: int, address: int | None) -> None:
        pass


class _Empty(Slots):
    """Slots that hold nothing."""

    def _read(self, missing: list[int]) -> None:
        pass


def previewed(
    trial: Any, stored: Sequence[StoredExperts], budget: int, given: CalibrationText | None
) -> OffloadPreview:
    """Try a budget in bytes on text, `given` or what the model writes; trial: a copy of the model."""
    text = calibration_text(trial, given)
    ids = text.ids[:, :MOST_TOKENS][: max(1, MOST_TOKENS // text.ids.shape[1])]
    routes = routing(trial, [each.path for each in stored], ids)
    unit = math.gcd(*(size for each in stored for size in each.bytes_of))
    stills: list[Any] = [_Still(each, unit) for each in stored]
    sizes = np.array([size for still in stills for size in still.bytes_of])
    slots = _Empty(None, stills, budget // unit)  # type: ignore[arg-type]
    counts = [np.zeros(each.form.experts, dtype=np.int64) for each in stored]
    for token in range(ids.numel()):
        for still, route, count in zip(stills, routes, counts, strict=True):
            chosen = np.unique(route[token])
            chosen = chosen[(chosen >= 0) & (chosen < len(count))]
            count[chosen] += 1
            if sizes[still.first + chosen].sum() <= slots.budget:
                slots.release(slots.acquire(still, chosen, np.ones_like(chosen)))
    share = concentration(torch.from_numpy(np.concatenate(counts)), sizes)
    wanted = slots.hits + slots.misses
    total = sum(sum(each.bytes_of) for each in stored)
    return OffloadPreview(budget, total, slots.hits / max(wanted, 1), share or 0.0, ids.numel(), text.source)


@torch.no_grad()
def routing(model: Any, paths: Sequence[str], ids: Tensor) -> list[np.ndarray]:
    """Return the experts [B T, k] that each of the modules `paths` is asked for, for token ids [B, T]."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found[path].append(options["top_k_index"] if "top_k_index" in options else args[1])

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in paths]
    try:
        for row in ids:
            model(row[None])
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts).numpy() for parts in found.values()]
