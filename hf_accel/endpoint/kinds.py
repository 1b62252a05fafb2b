"""What is different between answers to messages and to prompts."""

from __future__ import annotations

from typing import Any

from hf_accel.endpoint.alternatives import Scored, token_bytes, token_text
from hf_accel.endpoint.answers import Answer


class ChatAnswer(Answer):
    """A message."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def beginning(self) -> list[dict[str, Any]]:
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(number, None, None, role) for number in range(self._choices)]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _scored(self, scored: list[Scored]) -> dict[str, Any]:
        content = []
        for one in scored:
            best = [self._token(token, logprob) for token, logprob in one.best]
            content.append(self._token(one.token, one.logprob) | {"top_logprobs": best})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, code = token_text(self._tokenizer, token), token_bytes(self._tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": code}


class CompletionAnswer(Answer):
    """A continued prompt."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _text

    def _scored(self, scored: list[Scored]) -> dict[str, Any]:
        best = [{token_text(self._tokenizer, token): logprob for token, logprob in one.best} for one in scored]
        return {
            "tokens": [token_text(self._tokenizer, one.token) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": best if any(best) else None,
            "text_offset": [one.start for one in scored],
        }
