"""What the conversion to fewer key and value heads is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError

METHODS = ("aligned", "mean", "first")


@dataclass(frozen=True, kw_only=True)
class GQAConfig(Config):
    """Fewer key and value heads: multi-head attention becomes grouped-query attention, or multi-query with one head.

    num_kv_heads: of every layer afterwards. It divides the query heads, and there are fewer than before.
    method: "aligned" groups heads by what they do on calibration text, finds what the heads of a group have in common
        after turning them into each other, and repairs what is lost; "mean" pools neighbouring heads (Ainslie et al.
        2023, arXiv:2305.13245, section 2.1); "first" keeps the first of neighbours. The last two are baselines, whose
        models have to be trained on.
    calibration: token ids [B, T] of the text to align and repair on. None: the text given to `optimize` or `plan`, or
        some that the model writes itself. Text of the kind that the model will write is best. The other methods read
        none; a preview of them is measured on it.
    repair_steps: gradient steps of the repair of each layer, a part of "aligned"; 0 leaves the closed forms alone. Time
        grows with them.
    """

    num_kv_heads: int
    method: str = "aligned"
    calibration: Any = field(default=None, repr=False)  # thousands of numbers, which plans and reports do not print
    repair_steps: int = 200

    def __post_init__(self) -> None:
        self.check_integer("num_kv_heads", 1)
        self.check_integer("repair_steps", 0)
        if self.method not in METHODS:
            raise ConfigError(f"GQAConfig.method is one of {', '.join(METHODS)}; {self.method!r} was given.")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", _rows(self.calibration))


def _rows(given: Any) -> tuple[tuple[int, ...], ...]:
    """Return token ids [B, T] as plain data, which compares by value and can be written as JSON."""
    try:
        is_whole = isinstance(given, (torch.Tensor, Sequence)) or hasattr(given, "__array__")
        ids = torch.as_tensor(given if is_whole else list(given))
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(given, Sequence) and len({len(row) for row in given if isinstance(row, Sequence)}) > 1:
            raise ConfigError("GQAConfig.calibration has rows of several lengths. Give rows of one length.") from error
        ids = torch.empty(0)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise ConfigError(
            "GQAConfig.calibration is token ids [B, T]; texts are given to optimize or plan, with their tokenizer. "
            f"{type(given).__name__} of shape {list(ids.shape)} was given."
        )
    return tuple(tuple(row) for row in ids.tolist())
