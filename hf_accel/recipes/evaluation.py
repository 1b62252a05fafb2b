"""How far a student is from its teacher on held-out windows: KL divergence, agreement, both perplexities."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.modes import evaluating
from hf_accel.measure.quality import Comparison, Quality
from hf_accel.recipes.distillation import chunk_rows


@torch.no_grad()
def compare(
    student: Any, teacher: Any, windows: Tensor, source: str, is_own: bool, batch: int, until: float = math.inf
) -> tuple[Quality, int]:
    """Return the quality of `student` against `teacher` on token ids [N, W], and how many windows were used.

    The student is measured in eval mode and gets its mode back. `until`: after this time (`time.monotonic`) no further
    batch is begun; one always is. Nothing of the models' outputs is kept.
    """
    total = Comparison()
    used = 0
    with evaluating(student):
        for rows in windows.long().split(batch):
            if used and time.monotonic() > until:
                break
            ours = student(rows.to(student.device), use_cache=False).logits
            theirs = teacher(rows.to(teacher.device), use_cache=False).logits
            step = chunk_rows(ours.shape[-1])
            parts = (logits[:, :-1].flatten(0, 1).split(step) for logits in (theirs, ours))
            for old, new, targets in zip(*parts, rows[:, 1:].flatten().split(step), strict=True):
                total.add(_log_probabilities(old), _log_probabilities(new), targets)
            used += len(rows)
    return total.quality(source, is_own), used


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float().cpu(), -1)
