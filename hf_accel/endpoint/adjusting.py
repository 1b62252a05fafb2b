"""Penalties and biases of a request, exactly as OpenAI defines them."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from hf_accel.endpoint.asked import Asked


class Adjusting(LogitsProcessor):
    """Adds each token's bias, and takes `frequency` for each time it was written, and `presence` if it was at all.

    Tokens of the prompt do not count. The scores are the model's, before a temperature divides them. Cost per step:
    three passes over scores [n, V].
    """

    def __init__(self, asked: Asked, prompt_tokens: int) -> None:
        self._presence, self._frequency = asked.presence_penalty, asked.frequency_penalty
        self._bias, self._prompt_tokens = asked.bias, prompt_tokens

    @classmethod
    def is_needed(cls, asked: Asked) -> bool:
        """Return whether the request changes a score."""
        return bool(asked.presence_penalty or asked.frequency_penalty or asked.bias)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        if self._bias:
            scores[:, list(self._bias)] += torch.tensor(list(self._bias.values()), device=scores.device)
        written = input_ids[:, self._prompt_tokens :]
        if written.shape[1] and (self._presence or self._frequency):
            counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
            scores -= self._frequency * counts + self._presence * (counts > 0)
        return scores
