"""What comes of a generation, handed from the thread that generates to the event loop that answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hf_accel.endpoint.choices import Piece
from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.generating import Generation


class Outcome:
    """The pieces of one generation as they come. Made within the event loop that will read them.

    streams: whether somebody waits for each; otherwise they are handed over at the end, as waking the event loop for
    each token takes time from the thread that generates.
    """

    def __init__(self, generation: Generation, streams: bool) -> None:
        self.generation, self._streams = generation, streams
        self._kept: list[Piece] = []
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Refusal | None] = asyncio.Queue()

    def show(self, piece: Piece) -> None:
        """Hand over a piece; from the thread that generates."""
        if self._streams:
            self._send(piece)
        else:
            self._kept.append(piece)

    def end(self, error: Refusal | None) -> None:
        """Say that no more comes, and why; from the thread that generates."""
        for piece in self._kept:
            self._send(piece)
        self._send(error)

    def _send(self, item: Piece | Refusal | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.generation.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces until no more come. Whoever stops reading before cancels the generation.

        Raises:
            Refusal: the model failed, or the generation was cancelled.
        """
        is_over = False
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Refusal):
                    is_over = True
                    raise item
                yield item
            is_over = True
        finally:
            if not is_over:
                self.generation.cancel()
        if self.generation.is_cancelled:
            raise Refusal("The request was cancelled before its end.", status=503, code="cancelled")
