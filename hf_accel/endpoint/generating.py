"""From what is asked to one `model.generate` call, and from its tokens to pieces as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_accel.core.calls.cancelling import cancellable
from hf_accel.endpoint.adjusting import Adjusting
from hf_accel.endpoint.alternatives import Recorder
from hf_accel.endpoint.asked import Asked
from hf_accel.endpoint.choices import Choice, Piece
from hf_accel.endpoint.draws import drawing
from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.prompts import Prompt
from hf_accel.errors import CancelledCallError


class Generation:
    """One request's call of `generate`."""

    def __init__(self, model: Any, tokenizer: Any, prompt: Prompt, asked: Asked) -> None:
        """Raise a Refusal where a bias names a token that the model does not have."""
        self._model, self._tokenizer, self._prompt, self._asked = model, tokenizer, prompt, asked
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        if wrong := [token for token in asked.bias if token >= vocabulary]:
            raise Refusal(f"logit_bias: the model has no token {wrong[0]} (of {vocabulary}).", param="logit_bias")
        config = model.generation_config
        self.samples = bool(config.do_sample) if asked.samples is None else asked.samples
        found = config.eos_token_id
        self._ends = set() if found is None else {found} if isinstance(found, int) else set(found)
        self.choices = [
            Choice(number, tokenizer, prompt.before, asked.stop, self._ends, prompt.new_tokens)
            for number in range(asked.choices)
        ]
        self.recorder = None if asked.logprobs is None else Recorder(asked.logprobs)
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Let the call end at its next token; from any thread, at any time."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def completion_tokens(self) -> int:
        """How many tokens have been written, of all choices, with those that ended them."""
        return sum(choice.tokens for choice in self.choices)

    def run(self, show: Callable[[Piece], None], was_step: Callable[[int], None]) -> None:
        """Generate; returns when all choices have ended, or after a cancellation.

        show: is given each piece, in this thread. was_step: is given the number of tokens of each step.
        """
        if self.is_cancelled:
            return
        with (
            drawing(self._model, self.samples, self._asked.seed) as draws,
            cancellable(self._cancelled),
            suppress(CancelledCallError),  # while it waited for a place
        ):
            if not self.is_cancelled:  # while others drew
                watch = _Watch(self, len(self._prompt.tokens), show, was_step)
                self._model.generate(**self._arguments(watch), **draws)
        for choice in self.choices:  # what the model's own generation config ended
            if not self.is_cancelled and (piece := choice.end("stop")) is not None:
                show(piece)

    def _arguments(self, watch: StoppingCriteria) -> dict[str, Any]:
        asked, config = self._asked, self._model.generation_config
        ids = torch.tensor([self._prompt.tokens] * asked.choices, device=self._model.device)
        processors = LogitsProcessorList([] if self.recorder is None else [self.recorder])
        if Adjusting.is_needed(asked):
            processors.append(Adjusting(asked, ids.shape[1]))
        found: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": self._prompt.new_tokens,
            "stopping_criteria": StoppingCriteriaList([watch]),
            "logits_processor": processors,
            "do_sample": self.samples,
            "num_beams": 1,
            "num_return_sequences": 1,
        }
        if config.pad_token_id is None and self._ends:
            found["pad_token_id"] = min(self._ends)
        if config.stop_strings:
            found["tokenizer"] = self._tokenizer
        if asked.samples:  # 1 asks for the distribution as it is, and so does what is not named
            found |= {"temperature": 1.0 if asked.temperature is None else float(asked.temperature)}
            found |= {"top_p": 1.0 if asked.top_p is None else float(asked.top_p)}
            found |= {"top_k": config.top_k or 0}
        return found


class _Watch(StoppingCriteria):
    """Is shown the text after each step: reads off the new tokens, and says which rows are over.

    A criterion, because it is asked before the next step, in order, also where several tokens come at once.
    """

    def __init__(
        self, generation: Generation, seen: int, show: Callable[[Piece], None], was_step: Callable[[int], None]
    ) -> None:
        self._generation, self._seen, self._show, self._was_step = generation, seen, show, was_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        generation, before = self._generation, self._generation.completion_tokens
        new, self._seen = input_ids[:, self._seen :].tolist(), input_ids.shape[1]
        pieces = []
        for row, (choice, tokens) in enumerate(zip(generation.choices, new, strict=True)):
            for token in tokens:
                recorder = generation.recorder
                scored = None if recorder is None or choice.finish else recorder.scored(row, token)
                pieces.append(choice.take(token, scored))
        self._was_step(generation.completion_tokens - before)
        for piece in pieces:
            if piece is not None:
                self._show(piece)
        is_over = [generation.is_cancelled or bool(choice.finish) for choice in generation.choices]
        return torch.tensor(is_over, device=input_ids.device)
