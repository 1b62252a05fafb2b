"""Answers in OpenAI's form: whole, or as the chunks of a stream. One class for each kind of request."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from hf_accel.endpoint.alternatives import Scored
from hf_accel.endpoint.choices import Piece


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return what a request used."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Answer(ABC):
    """The answer to one request. scores: whether log-probabilities were asked for."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, tokenizer: Any, choices: int, scores: bool) -> None:
        self._tokenizer, self._choices, self._scores = tokenizer, choices, scores
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], used: dict[str, int]) -> dict[str, Any]:
        """Return the answer from all of its pieces."""
        choices = []
        for number in range(self._choices):
            own = [piece for piece in pieces if piece.choice == number]
            text, scored = "".join(piece.text for piece in own), [one for piece in own for one in piece.scored]
            finish = next((piece.finish for piece in own if piece.finish), None)
            choices.append(
                {"index": number, "finish_reason": finish, "logprobs": self._logprobs(scored), **self._text(text)}
            )
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": used}

    def beginning(self) -> list[dict[str, Any]]:
        """Return the chunks that a stream begins with."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece."""
        logprobs = self._logprobs(piece.scored) if piece.scored else None
        return self._chunk(piece.choice, piece.finish, logprobs, self._delta(piece.text))

    def end(self, used: dict[str, int]) -> dict[str, Any]:
        """Return the last chunk of a stream that says what was used."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": used}

    def _chunk(self, number: int, finish: str | None, logprobs: Any, text: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": number, "finish_reason": finish, "logprobs": logprobs, **text}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any] | None:
        return self._scored(scored) if self._scores else None

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]:
        """Return how a choice has its text."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """Return how a choice has a piece of its text."""

    @abstractmethod
    def _scored(self, scored: list[Scored]) -> dict[str, Any]:
        """Return log-probabilities of tokens."""
