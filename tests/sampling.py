"""What choosing a token natively is compared with: transformers' own processors and torch's own draw."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

from hf_accel.kernels.native import Rules

RULES: dict[str, Rules] = {
    "nothing": Rules(),
    "temperature": Rules(temperature=0.7),
    "top-k": Rules(top_k=50),
    "the best": Rules(top_k=1),
    "top-p": Rules(top_p=0.9),
    "few of top-p": Rules(temperature=1.7, top_p=0.3),
    "min-p": Rules(min_p=0.1),
    "penalty": Rules(penalty=1.3),
    "usual": Rules(temperature=0.8, top_k=50, top_p=0.9),
    "all": Rules(penalty=0.8, temperature=0.9, top_k=40, top_p=0.95, min_p=0.02),
}
KINDS = ("smooth", "bf16", "whole numbers", "equal", "one high", "flat", "suppressed")


def processors(rules: Rules, ignored: Any = None) -> LogitsProcessorList:
    """Return the processors, in the order in which transformers makes them."""
    found = LogitsProcessorList()
    if rules.penalty is not None:
        found.append(stock.RepetitionPenaltyLogitsProcessor(rules.penalty, ignored))
    if rules.temperature is not None:
        found.append(stock.TemperatureLogitsWarper(rules.temperature))
    if rules.top_k is not None:
        found.append(stock.TopKLogitsWarper(rules.top_k))
    if rules.top_p is not None:
        found.append(stock.TopPLogitsWarper(rules.top_p))
    if rules.min_p is not None:
        found.append(stock.MinPLogitsWarper(rules.min_p))
    return found


def drawn(logits: torch.Tensor, ids: torch.Tensor, rules: Rules, ignored: Any = None) -> torch.Tensor:
    """Return the tokens [B] that stock draws from logits [B, V] after ids [B, S]."""
    scores = processors(rules, ignored)(ids, logits.to(torch.float32, copy=True))
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def scores_of(kind: str, rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Return logits [rows, vocabulary] of a kind in KINDS; of bf16 and whole numbers, many are equal."""
    normal = torch.randn(rows, vocabulary, generator=generator) * 3
    if kind == "bf16":
        return normal.bfloat16()
    if kind == "whole numbers":
        return normal.round()
    if kind == "equal":
        return torch.full((rows, vocabulary), 1.5)
    if kind == "one high":
        normal[:, vocabulary // 2] = 30.0
    if kind == "suppressed":
        normal[:, 1:][torch.rand(rows, vocabulary - 1, generator=generator) < 0.5] = -torch.inf
    return normal * 0.02 if kind == "flat" else normal
