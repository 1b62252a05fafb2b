"""Where a text in progress gets the next token of every row from: the interface, and plain decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.single_tokens import SingleTokens
from hf_accel.decoding.arrival import can_drop_tokens, is_plainly_greedy, lag_of
from hf_accel.decoding.choosing import NextTokens, next_tokens
from hf_accel.decoding.draws import random_state, set_random_state
from hf_accel.decoding.leaving import Leaving, Passes


class Steps(ABC):
    """A source of tokens for one call."""

    cache: Any  # as the caller gets it back
    leaving: Leaving | None = None  # where rows that have ended may leave
    lag = 0  # how many steps may be made before it is known that the text was done before them

    def follow(self) -> NextTokens | None:
        """Return the next token of every row where it is had without the text so far; None: ask `next`."""
        return None

    @property
    @abstractmethod
    def passes(self) -> Passes:
        """What makes the forward passes."""

    def leave(self, ended: set[int], tokens: int) -> None:
        """Let rows leave the passes that are known to have ended; tokens: of every row so far."""
        if self.leaving is not None:
            self.leaving.consider(ended, tokens)

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
        batch = len(call.input_ids)
        self.call, self._passes = call, SingleTokens(call.model, call.model_kwargs, outputs, batch, is_first)
        self.lag = lag_of(call)
        self._is_plainly_greedy = is_plainly_greedy(call)
        # of the random generator before the last steps
        self._states: deque[torch.Tensor] = deque(maxlen=self.lag)
        self._surplus = 0

    @property
    def passes(self) -> SingleTokens:
        return self._passes

    def follow(self) -> NextTokens | None:
        tokens = self._passes.follow() if self._is_plainly_greedy else None
        return None if tokens is None else NextTokens(tokens, None, None)

    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> NextTokens:
        if self.lag and self.call.generation_config.do_sample:
            self._states.append(random_state(input_ids.device))
        return next_tokens(self._passes.next(input_ids), input_ids, self.call, self._passes.present)

    def take_back(self, steps: int) -> None:
        self._surplus = steps
        if self._states:
            set_random_state(self._states[-steps], self.call.input_ids.device)

    def close(self, input_ids: torch.Tensor) -> None:
        self.cache = self._passes.close()
        if self._surplus and can_drop_tokens(self.cache):
            self.cache.crop(-self._surplus)
