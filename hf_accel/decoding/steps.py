"""Where a text in progress gets the next token of every row from: the interface, and plain decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.forward import SingleTokens
from hf_accel.decoding.arrival import can_drop_tokens, is_plainly_greedy, lag_of
from hf_accel.decoding.choosing import NextTokens, next_tokens
from hf_accel.decoding.draws import random_state, set_random_state


class Steps(ABC):
    """A source of tokens for one call."""

    cache: Any  # as the caller gets it back
    lag = 0  # how many steps may be made before it is known that the text was done before them

    def follow(self) -> NextTokens | None:
        """Return the next token of every row where it is had without the text so far; None: ask `next`."""
        return None

    @abstractmethod
    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> NextTokens:
        """Return the next token of every row. input_ids: [B, S], all so far; unfinished: [B], rows that still count."""

    def take_back(self, steps: int) -> None:
        """Undo the last steps, of which there are at most `lag`."""
        raise NotImplementedError

    @abstractmethod
    def close(self, input_ids: torch.Tensor) -> None:
        """Leave cache and random generator as stock leaves them after these tokens."""


class PlainSteps(Steps):
    """One forward pass per token."""

    def __init__(self, call: Call, outputs: Any, is_first: bool = True) -> None:
        """Begin with the outputs of the prompt, or of a later pass, whose tokens are chosen already."""
        self.call, self.passes = call, SingleTokens(call.model, call.model_kwargs, outputs, is_first)
        self.lag = lag_of(call)
        self._is_plainly_greedy = is_plainly_greedy(call)
        # of the random generator before the last steps
        self._states: deque[torch.Tensor] = deque(maxlen=self.lag)
        self._surplus = 0

    def follow(self) -> NextTokens | None:
        tokens = self.passes.follow() if self._is_plainly_greedy else None
        return None if tokens is None else NextTokens(tokens, None, None)

    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> NextTokens:
        if self.lag and self.call.generation_config.do_sample:
            self._states.append(random_state(input_ids.device))
        return next_tokens(self.passes.next(input_ids), input_ids, self.call)

    def take_back(self, steps: int) -> None:
        self._surplus = steps
        if self._states:
            set_random_state(self._states[-steps], self.call.input_ids.device)

    def close(self, input_ids: torch.Tensor) -> None:
        self.cache = self.passes.close()
        if self._surplus and can_drop_tokens(self.cache):
            self.cache.crop(-self._surplus)
