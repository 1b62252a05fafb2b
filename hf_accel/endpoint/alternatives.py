"""Log-probabilities of tokens and of their alternatives, and the bytes that a token stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes that characters of byte-level tokenizers stand for: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how tokenizers with byte fallback write a byte


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and the likeliest ones in its place (token, log-probability).

    start: the character of the choice's text that it begins at.
    """

    token: int
    logprob: float
    best: list[tuple[int, float]]
    start: int = 0


class Recorder(LogitsProcessor):
    """Notes how likely the model holds each token, before anything that the request asks for is done to the scores."""

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._logprobs: torch.Tensor | None = None  # [n, V] of the step in progress

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = scores.float().log_softmax(dim=-1)
        return scores

    def scored(self, row: int, token: int) -> Scored:
        """Return the token that was chosen in a row from what was noted last."""
        if self._logprobs is None:
            raise RuntimeError("The model chose a token without asking the logits processors of the call.")
        line = self._logprobs[row]
        found = line.topk(min(self._alternatives, len(line))) if self._alternatives else None
        best = [] if found is None else list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        return Scored(token, float(line[token]), best)


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as text; bytes that are no character by themselves are written as U+FFFD."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """Return the bytes of a token in UTF-8, so that those of several make characters; None: they are not known."""
    text = token_text(tokenizer, token)
    if "\ufffd" not in text:
        return list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
        return [int(byte[1], 16)]
    if all(character in _BYTE_OF for character in piece):
        return [_BYTE_OF[character] for character in piece]
    return None
