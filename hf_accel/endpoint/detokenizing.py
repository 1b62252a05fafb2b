"""Text from tokens as they come: no character before all of its bytes are there."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one


class Detokenizer:
    """The text of one choice. What has been returned, joined, is what decoding all tokens at once gives.

    Only tokens since the last whole character but one are decoded again, so a token costs the same at any length. They
    show the decoder what stands before a token: some write the first word of a text without its space.
    """

    def __init__(self, tokenizer: Any, before: list[int] | None = None) -> None:
        """before: the end of the prompt, which the text goes on behind; none: the text stands for itself."""
        self._tokenizer, self._tokens = tokenizer, list(before or [])
        if self._decoded(0).endswith(_UNFINISHED):  # the prompt ends within a character
            self._tokens = []
        self._start, self._read = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """Return the text that is certain now that this token has come."""
        self._tokens.append(token)
        text = self._decoded(self._start)
        return "" if text.endswith(_UNFINISHED) else self._taken(text)

    def finish(self) -> str:
        """Return what was held back: bytes that have become no character."""
        return self._taken(self._decoded(self._start))

    def _taken(self, text: str) -> str:
        known = len(self._decoded(self._start, self._read))
        if len(text) > known:
            self._start, self._read = self._read, len(self._tokens)
            self._drop()
        return text[known:]

    def _drop(self) -> None:
        del self._tokens[: self._start]
        self._start, self._read = 0, self._read - self._start

    def _decoded(self, start: int, stop: int | None = None) -> str:
        tokens = self._tokens[start:stop]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
