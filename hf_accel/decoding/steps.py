"""Where the token loop gets the next token of every row from: the interface, and plain decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.decoding.inputs import LeanInputs, StockInputs


@dataclass
class Step:
    """The next token of every row, [B], with what it was chosen from where that is kept: [B, V] each, fp32."""

    tokens: torch.Tensor
    scores: torch.Tensor | None
    logits: torch.Tensor | None
    outputs: Any = None  # of the forward pass, with attentions and hidden states


class Steps(ABC):
    """A source of tokens for one call."""

    cache: Any  # as the caller gets it back

    @abstractmethod
    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> Step:
        """Return the next token of every row. input_ids: [B, S], all so far; unfinished: [B], rows that still count."""

    @abstractmethod
    def close(self, input_ids: torch.Tensor) -> None:
        """Leave cache and random generator as stock leaves them after these tokens."""


class PlainSteps(Steps):
    """One forward pass per token."""

    def __init__(self, call: Call, outputs: Any) -> None:
        self.call, self.outputs = call, outputs
        lean = LeanInputs.fit(call.model, call.model_kwargs, outputs)
        self.inputs = LeanInputs(call.model_kwargs) if lean else StockInputs(call.model, call.model_kwargs)
        self._is_first = True

    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> Step:
        call = self.call
        if not self._is_first:
            model_inputs = self.inputs.next(self.outputs, input_ids)
            self.outputs = None  # the logits of the prompt can be large
            self.outputs = call.model(**model_inputs, return_dict=True)
        self._is_first = False
        logits = self.outputs.logits[:, -1].to(device=input_ids.device, dtype=torch.float32, copy=True)
        scores = call.logits_processor(input_ids, logits)
        return Step(self.select(scores, call.generation_config.do_sample), scores, logits, self.outputs)

    def close(self, input_ids: torch.Tensor) -> None:
        self.inputs.absorb(self.outputs)
        self.cache = self.inputs.cache

    @staticmethod
    def select(scores: torch.Tensor, samples: bool) -> torch.Tensor:
        """Choose a token per row from processed scores [B, V], by the draws that stock makes."""
        if samples:
            return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return torch.argmax(scores, dim=-1)
