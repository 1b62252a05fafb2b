"""One choice of a request in progress: its tokens become pieces of text until it ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hf_accel.endpoint.alternatives import Scored
from hf_accel.endpoint.detokenizing import Detokenizer
from hf_accel.endpoint.stopping import StopText


@dataclass(frozen=True)
class Piece:
    """What is new of a choice. finish: why it ended, "stop" or "length"; None: it goes on."""

    choice: int
    text: str
    scored: list[Scored] = field(default_factory=list)
    finish: str | None = None


class Choice:
    """Takes the tokens of one row of a `generate` call; those after its end are padding, and do not count.

    ends: the tokens that end a text. most: tokens after which it is over.
    """

    def __init__(
        self, number: int, tokenizer: Any, before: list[int], stops: tuple[str, ...], ends: set[int], most: int
    ):
        self.number, self.tokens, self.finish = number, 0, ""
        self._ends, self._most = ends, most
        self._text, self._stop = Detokenizer(tokenizer, before), StopText(stops)
        self._written = self._shown = 0  # characters: known, and handed out
        self._scored: list[Scored] = []  # not handed out yet

    def take(self, token: int, scored: Scored | None = None) -> Piece | None:
        """Take the next token; return what is to be shown now, None if nothing is."""
        if self.finish:
            return None
        self.tokens += 1
        if token in self._ends:
            return self.end("stop")
        if scored is not None:
            self._scored.append(replace(scored, start=self._written))
        shown = self._add(self._text.add(token))
        if self._stop.is_found:
            return self._piece(shown, "stop")
        if self.tokens == self._most:
            return self.end("length", shown)
        return self._piece(shown) if shown else None

    def end(self, finish: str, shown: str = "") -> Piece | None:
        """End the choice, if it has not ended, and return what was held back; it may hold a stop string after all."""
        if self.finish:
            return None
        shown += self._add(self._text.finish())
        if self._stop.is_found:
            return self._piece(shown, "stop")
        return self._piece(shown + self._stop.finish(), finish)

    def _add(self, text: str) -> str:
        self._written += len(text)
        return self._stop.add(text)

    def _piece(self, text: str, finish: str = "") -> Piece:
        self.finish = finish
        self._shown += len(text)
        # with the text that they begin; a token within a stop string begins beyond the end
        is_all = finish and not self._stop.is_found
        ready = [scored for scored in self._scored if is_all or scored.start < self._shown]
        self._scored = self._scored[len(ready) :]
        return Piece(self.number, text, ready, finish or None)
