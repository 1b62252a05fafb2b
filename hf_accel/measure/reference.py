"""Compares a patched model with what it was before, on text of the user's: prefill and decoding steps.

The stock model writes a few tokens; the patched one is made to write the same, so that both see the same context and
their logits can be compared step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_accel.measure.latency import PLAIN

NEW_TOKENS = 4


class _Force(LogitsProcessor):
    """Lets only the given continuation [B, new tokens] be chosen."""

    def __init__(self, prompt_tokens: int, continuation: torch.Tensor) -> None:
        self.prompt_tokens, self.continuation = prompt_tokens, continuation

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.continuation[:, input_ids.shape[1] - self.prompt_tokens]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


class Reference:
    """The logits of a model on some text before it is patched."""

    def __init__(self, model: PreTrainedModel, text: Any, new_tokens: int = NEW_TOKENS) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.inputs = dict(text) if isinstance(text, Mapping) else {"input_ids": torch.as_tensor(text)}
        self.inputs.setdefault("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        self.inputs = {name: tensor.to(model.device) for name, tensor in self.inputs.items()}
        self.prompt_tokens = self.inputs["input_ids"].shape[1]
        self.sequences, self.logits = self._generate([])

    def _generate(self, processors: list[LogitsProcessor]) -> tuple[torch.Tensor, torch.Tensor]:
        options = PLAIN | {
            "max_new_tokens": self.new_tokens,
            "min_new_tokens": self.new_tokens,
            "pad_token_id": 0,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        output = self.model.generate(  # type: ignore[operator]
            **self.inputs, logits_processor=LogitsProcessorList(processors), **options
        )
        return output.sequences, torch.stack(output.logits).double()

    def difference(self) -> float:
        """Return the relative difference of the model's logits now, over all steps."""
        _, logits = self._generate([_Force(self.prompt_tokens, self.sequences[:, self.prompt_tokens :])])
        return float((logits - self.logits).norm() / self.logits.norm())
