"""Where a text in progress gets the next token of every row from: the interface, and plain decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.forward import SingleTokens
from hf_accel.decoding.choosing import NextTokens, next_tokens


class Steps(ABC):
    """A source of tokens for one call."""

    cache: Any  # as the caller gets it back

    @abstractmethod
    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> NextTokens:
        """Return the next token of every row. input_ids: [B, S], all so far; unfinished: [B], rows that still count."""

    @abstractmethod
    def close(self, input_ids: torch.Tensor) -> None:
        """Leave cache and random generator as stock leaves them after these tokens."""


class PlainSteps(Steps):
    """One forward pass per token."""

    def __init__(self, call: Call, outputs: Any) -> None:
        self.call, self.passes = call, SingleTokens(call.model, call.model_kwargs, outputs)

    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> NextTokens:
        return next_tokens(self.passes.next(input_ids), input_ids, self.call)

    def close(self, input_ids: torch.Tensor) -> None:
        self.cache = self.passes.close()
