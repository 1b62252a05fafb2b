"""From an outcome to a response: JSON, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hf_accel.endpoint.answers import Answer, usage
from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.outcome import Outcome

CLIENT_GONE = 499  # nobody is sent this status; it is counted

Counted = Callable[[int], None]


class Reply:
    """One request's response. was_answered: is given the status once it is known how the request ended."""

    def __init__(self, answer: Answer, outcome: Outcome, prompt_tokens: int, was_answered: Counted) -> None:
        self._answer, self._outcome, self._prompt_tokens = answer, outcome, prompt_tokens
        self._was_answered = was_answered
        self._is_gone = False

    async def whole(self, request: Request) -> Response:
        """Return the whole answer; a client that goes away meanwhile cancels what is generated for it.

        Raises:
            Refusal: the model failed.
        """
        self._watch(request)
        try:
            pieces = [piece async for piece in self._outcome.pieces()]
        except Refusal:
            if self._is_gone:
                self._was_answered(CLIENT_GONE)
                return Response(status_code=CLIENT_GONE)
            raise
        self._was_answered(200)
        return JSONResponse(self._answer.whole(pieces, self._used()))

    def stream(self, request: Request, includes_usage: bool) -> Response:
        """Return the answer as it is written; a client that goes away cancels what is generated for it."""
        self._watch(request)  # the stream itself may not even begin
        events = self._events(includes_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _events(self, includes_usage: bool) -> AsyncIterator[str]:
        status = CLIENT_GONE
        extra = {"usage": None} if includes_usage else {}
        try:
            for chunk in self._answer.beginning():
                yield _event(chunk | extra)
            async for piece in self._outcome.pieces():
                yield _event(self._answer.chunk(piece) | extra)
            if includes_usage:
                yield _event(self._answer.end(self._used()))
            status = 200
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            status = refusal.status
            yield _event(refusal.body())
        finally:
            self._outcome.generation.cancel()  # of no effect on what is over
            self._was_answered(status)

    def _watch(self, request: Request) -> None:
        """Cancel the generation when the client has gone, which is also said after the end of the response."""

        async def until_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                continue
            self._is_gone = True
            self._outcome.generation.cancel()

        self._watching = asyncio.create_task(until_gone())

    def _used(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self._outcome.generation.completion_tokens)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
