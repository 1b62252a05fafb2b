"""The loss of distillation: how far a student's next-token distributions are from a teacher's.

Hinton, Vinyals and Dean 2015 (arXiv:1503.02531): with p = softmax(teacher / t) and q = softmax(student / t) the loss is
t² D(p || q), whose gradient by the student's logits is t (q - p); the factor t² keeps its size over temperatures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # a position without a target
_CHUNK_VALUES = 1 << 19  # logits worked on at a time: 2 MB in fp32 stay in the processor's cache


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of logits are worked on at a time."""
    return max(1, _CHUNK_VALUES // vocabulary)


class _Divergence(torch.autograd.Function):
    """Value and gradient in one pass over chunks of rows; the gradient takes the place of the teacher's logits.

    Beside the two models' logits [B, T, V] nothing of their size is made, where autograd would keep four in fp32.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, hard: float) -> Tensor:
        vocabulary = student.shape[-1]
        rows, references, labels = student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary), targets.flatten()
        reuses = references.dtype is rows.dtype and references.device == rows.device
        gradient = references if reuses else torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float64)
        count, labelled = len(rows), max(1, int((labels != IGNORED).sum()))
        step = chunk_rows(vocabulary)
        for start in range(0, count, step):
            part = slice(start, start + step)
            logits = rows[part].float()
            log_q = functional.log_softmax(logits / temperature if temperature != 1 else logits, -1)
            p = references[part].to(logits.device).float()
            p = functional.softmax(p / temperature if temperature != 1 else p, -1)
            soft = functional.kl_div(log_q, p, reduction="sum")
            total += (1 - hard) * temperature**2 / count * soft.double().cpu()
            slope = log_q.exp_().sub_(p).mul_((1 - hard) * temperature / count)
            if hard:
                wanted = labels[part]
                known = wanted != IGNORED
                log_q = functional.log_softmax(logits, -1)
                total += hard / labelled * functional.nll_loss(log_q[known], wanted[known], reduction="sum").cpu()
                off = log_q.exp_()
                off[torch.arange(len(wanted), device=off.device)[known], wanted[known]] -= 1
                slope += off.mul_(hard / labelled).mul_(known[:, None])
            gradient[part] = slope
        ctx.gradient = gradient.view(student.shape)
        return total.float().to(student.device)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None  # once: it is scaled in place
        return gradient.mul_(outer[0]), None, None, None, None


def divergence(
    student: Tensor, teacher: Tensor, ids: Tensor, temperature: float = 1.0, cross_entropy_share: float = 0.0
) -> Tensor:
    """Return (1 - share) t² D(teacher || student) + share · cross entropy, nats per token, as a scalar in fp32.

    Args:
        student: logits [B, T, V]; the gradient flows to them, once.
        teacher: logits [B, T, V]; overwritten where their data type is the student's.
        ids: token ids [B, T] that the logits were computed from: the token at t + 1 is the target of position t.
        temperature: t; both distributions are softened by it, the cross entropy is not.
    """
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return _Divergence.apply(student, teacher, targets, temperature, cross_entropy_share)


def hidden_state_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Return the mean over layers of |s - t|² / |t|², of hidden states [B, T, E] behind each layer; a scalar in fp32.

    `student` and `teacher` are what models return as `hidden_states`: the embeddings, then L layers.
    """
    terms = []
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        theirs = theirs.to(ours.device).float()
        terms.append((ours.float() - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12))
    return torch.stack(terms).mean()
