"""The text of one call in progress: what stock's loop does around choosing a token, in its order and precision."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_accel.core.calls.call import Call
from hf_accel.core.drift import CACHE
from hf_accel.decoding.arrival import Arrival
from hf_accel.decoding.choosing import NextTokens
from hf_accel.decoding.collected import Collected


class Writing:
    """One call's text, to which tokens are given until it is done; whoever drives it keeps nothing of its own.

    unfinished: [B], 1 for the rows that still count.
    lag: how many steps are taken in before it is known whether the text was done before them: a device that runs behind
    the host is asked late, and what turns out to be surplus is taken back.
    ended: the rows known to have ended, where `asks_who_ended`; they are given padding from then on.
    """

    def __init__(self, call: Call) -> None:
        config, self._ids = call.generation_config, call.input_ids
        self._device, (rows, self._length) = call.input_ids.device, call.input_ids.shape
        self._new: list[torch.Tensor] = []  # tokens [B] that are not in `_ids` yet
        self.unfinished = torch.ones(rows, dtype=torch.long, device=self._device)
        self._criteria, self._streamer = call.stopping_criteria, call.streamer
        pad: Any = config._pad_token_tensor
        self._pad: Any = pad.to(self._device) if pad is not None else None
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in call.stopping_criteria)
        self.pads_ended_rows = has_end and rows > 1  # a single row that has ended ends the text
        self._collected = Collected.for_config(config)
        self._collects = any(self._collected.wanted.values())
        self._returns_dict = config.return_dict_in_generate
        self.lag = 0
        self.asks_who_ended = False
        self.ended: set[int] = set()
        self._arrivals: deque[Arrival] = deque()
        self._latest: Arrival | None = None
        lengths = [criterion.max_length for criterion in self._criteria if type(criterion) is MaxLengthCriteria]
        self._most = min(lengths, default=0)
        # criteria that ask for no more than the last token and the length
        self._are_simple = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in self._criteria)
        self._ends: list[Any] = [criterion for criterion in self._criteria if type(criterion) is EosTokenCriteria]
        # what ends the text of a single row, where the host has its tokens without waiting; None: criteria are asked
        self._end_ids: frozenset[int] | None = None
        if rows == 1 and self._device.type == "cpu" and self._are_simple:
            self._end_ids = frozenset(token for end in self._ends for token in end.eos_token_id.flatten().tolist())
        positions = getattr(call.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._certain = min([*lengths, *([positions] if positions else [])], default=0)  # from here on, never late

    @property
    def length(self) -> int:
        """Tokens of every row, padding included."""
        return self._length

    @property
    def input_ids(self) -> torch.Tensor:
        """The text so far, [B, S]; tokens are joined when somebody asks."""
        if self._new:
            self._ids, self._new = torch.cat([self._ids, torch.stack(self._new, dim=1)], dim=1), []
        return self._ids

    def goes_on(self) -> bool:
        """Return whether to make another step; streamers are given what is known to belong to the text."""
        while len(self._arrivals) > self.lag or (self._arrivals and self._length >= self._certain):
            arrival = self._arrivals.popleft()
            tokens, is_done = arrival.get()
            if self._streamer is not None:
                self._streamer.put(tokens)
            if is_done:
                return False
            self.ended = arrival.ended()
        return True

    def take_back(self) -> int:
        """Drop the steps that were made after the text was done, and return how many there were."""
        surplus = len(self._arrivals)
        if surplus:
            self._arrivals.clear()
            self._ids, self._new = self.input_ids[:, :-surplus], []
            self._length -= surplus
            self._collected.drop(surplus)
        return surplus

    def take(self, step: NextTokens) -> None:
        """Append the next token of every row."""
        if self._collects:
            self._collected.add(step)
        tokens = step.tokens
        if self.pads_ended_rows:
            tokens = tokens * self.unfinished + self._pad * (1 - self.unfinished)
        self._new.append(tokens)
        self._length += 1
        is_done: torch.Tensor | bool = 0 < self._most <= self._length
        if self._end_ids is not None:
            is_done = is_done or (bool(self._end_ids) and int(tokens) in self._end_ids)
        elif not self._are_simple:
            self.unfinished = self.unfinished & ~self._criteria(self.input_ids, self._collected.scores)
            is_done = ~self.unfinished.any()
        elif self._ends:
            for end in self._ends:
                self.unfinished = self.unfinished & ~end(tokens[:, None], None)
            is_done = is_done or ~self.unfinished.any()
        unfinished = self.unfinished if self.asks_who_ended else None
        self._latest = Arrival(self._device, None if self._streamer is None else tokens, is_done, unfinished)
        self._arrivals.append(self._latest)

    def settle(self) -> None:
        """Wait for the latest step, surplus or not: who reads the text, or calls next, may be on another stream."""
        if self._latest is not None:
            self._latest.wait()

    def result(self, cache: Any) -> Any:
        """End the stream and return what stock's `_sample` would: ids [B, S], or a GenerateDecoderOnlyOutput."""
        if self._streamer is not None:
            self._streamer.end()
        if not self._returns_dict:
            return self.input_ids
        collected = self._collected
        return GenerateDecoderOnlyOutput(
            sequences=self.input_ids,  # type: ignore[arg-type]
            scores=collected.scores,
            logits=collected.logits,
            attentions=collected.attentions,
            hidden_states=collected.hidden_states,
            **{CACHE: cache},
        )
