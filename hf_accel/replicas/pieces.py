"""Text of a replica piece by piece: from the thread that writes it to the event loop, and on to the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from transformers import AsyncTextIteratorStreamer

from hf_accel.errors import ConfigError, HfAccelError, ReplicaError
from hf_accel.replicas.answering import Answering
from hf_accel.replicas.asked import Asked


class NobodyReads(HfAccelError):
    """Raised inside `generate` at the next token, once the caller is gone."""


class Streamer(AsyncTextIteratorStreamer):
    """Ends a call whose text nobody reads any more."""

    is_read = True

    def put(self, value: Any) -> None:
        """Take a token.

        Raises:
            NobodyReads: the caller is gone.
        """
        if not self.is_read:
            raise NobodyReads
        super().put(value)


async def pieces(answering: Answering, asked: Asked) -> AsyncIterator[str]:
    """Yield the answer to a text as it is written.

    Raises:
        ConfigError: there is no tokenizer.
        Others: as `generate`.
    """
    if answering.tokenizer is None:
        raise ConfigError(
            "Text comes in pieces from a tokenizer, and the recipe gives none: name one with tokenizer=..."
        )
    loop = asyncio.get_running_loop()
    streamer = Streamer(answering.tokenizer, skip_prompt=True, skip_special_tokens=True)
    writing = answering.submit(asked, streamer)
    # a call that fails ends no streamer
    writing.add_done_callback(lambda _: loop.call_soon_threadsafe(streamer.text_queue.put_nowait, streamer.stop_signal))
    try:
        async for piece in streamer:
            if piece:
                yield piece
        await asyncio.wrap_future(writing)
    finally:
        streamer.is_read = False
        writing.cancel()


class Continued:
    """The text that a caller was handed, over replicas that each begin it anew."""

    def __init__(self) -> None:
        self.given, self._again = "", ""

    def begin(self) -> None:
        """Begin anew, on another replica."""
        self._again = ""

    def new(self, piece: str) -> str:
        """Return what of a piece the caller does not have yet.

        Raises:
            ReplicaError: the text is another than the one that was handed over.
        """
        self._again += piece
        common = min(len(self.given), len(self._again))
        if self._again[:common] != self.given[:common]:
            raise ReplicaError(
                "A replica died in the middle of a text, and another writes it differently from what was handed over "
                "already: rounding decided a near-tie. Ask for the text anew; a recipe.planned() makes replicas alike."
            )
        found = self._again[len(self.given) :]
        self.given += found
        return found
