"""How far a student is from its teacher on held-out windows: KL divergence, agreement, both perplexities."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from hf_accel.measure.quality import Quality
from hf_accel.recipes.distillation import chunk_rows


@torch.no_grad()
def compare(
    student: Any, teacher: Any, windows: Tensor, source: str, is_own: bool, batch: int, until: float = math.inf
) -> tuple[Quality, int]:
    """Return the quality of `student` against `teacher` on token ids [N, W], and how many windows were used.

    The student is measured in eval mode and gets its mode back. `until`: after this time (`time.monotonic`) no further
    batch is begun; one always is. Nothing of the models' outputs is kept.
    """
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    used = 0
    try:
        for rows in windows.long().split(batch):
            if used and time.monotonic() > until:
                break
            ours = student(rows.to(student.device), use_cache=False).logits
            theirs = teacher(rows.to(teacher.device), use_cache=False).logits
            sums += _sums(ours[:, :-1], theirs[:, :-1], rows[:, 1:])
            used += len(rows)
    finally:
        for module, mode in modes:
            module.training = mode
    count = used * (windows.shape[1] - 1)
    kl, agreement, before, after = (float(value) / count for value in sums)
    quality = Quality(
        kl=kl,
        top1_agreement=agreement,
        perplexity_before=None if is_own else math.exp(min(before, 700)),
        perplexity_after=None if is_own else math.exp(min(after, 700)),
        tokens=count,
        source=source,
    )
    return quality, used


def _sums(ours: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of KL, agreement, and the losses of teacher and student, over logits [B, T, V]."""
    total = torch.zeros(4, dtype=torch.float64)
    step = chunk_rows(ours.shape[-1])
    parts = (tensor.reshape(-1, tensor.shape[-1]).split(step) for tensor in (ours, theirs))
    for new, old, target in zip(*parts, targets.flatten().split(step), strict=True):
        new, old = (torch.log_softmax(tensor.float().cpu(), -1) for tensor in (new, old))
        terms = torch.where(old == -math.inf, torch.zeros_like(old), old.exp() * (old - new))
        total[0] += terms.sum(-1).double().sum()
        total[1] += (old.argmax(-1) == new.argmax(-1)).sum()
        total[2] -= old.gather(1, target[:, None]).double().sum()
        total[3] -= new.gather(1, target[:, None]).double().sum()
    return total
