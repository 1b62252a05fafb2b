"""The application: which path does what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from hf_accel.endpoint.bodies import check_key, read_json
from hf_accel.endpoint.chat_fields import ChatFields, check_messages
from hf_accel.endpoint.completion_fields import DEFAULT_NEW_TOKENS, CompletionFields
from hf_accel.endpoint.errors import Refusal, failed
from hf_accel.endpoint.fields import Common, read_fields
from hf_accel.endpoint.generating import Generation
from hf_accel.endpoint.kinds import ChatAnswer, CompletionAnswer
from hf_accel.endpoint.limits import Limits
from hf_accel.endpoint.metrics import Metrics
from hf_accel.endpoint.pool import Pool
from hf_accel.endpoint.prompts import Prompt, Prompts
from hf_accel.endpoint.replying import Reply
from hf_accel.errors import ConfigError, UnsupportedModelError

T = TypeVar("T", bound=Common)


class Endpoint:
    """One model, and what clients may ask of it."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, limits: Limits, api_key: str | None) -> None:
        if api_key == "":
            raise ConfigError("api_key is empty: every client has that. Give a longer one, or None for none.")
        if not hasattr(model, "generate") or model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be served: a decoder-only model with `generate` is needed, such as "
                "AutoModelForCausalLM loads."
            )
        self._model, self._tokenizer, self._name, self._limits, self._key = model, tokenizer, name, limits, api_key
        self._metrics = Metrics()
        self._prompts, self._pool = Prompts(model, tokenizer, limits), Pool(limits, self._metrics)
        self._created = int(time.time())

    def app(self) -> FastAPI:
        """Return the application."""

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            await self._pool.close()

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.one_model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_exception_handler(Refusal, self._refused)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(Exception, self._refused)
        return app

    async def health(self) -> Response:
        """Say whether requests are taken."""
        is_closing = self._pool.is_closing
        return JSONResponse({"status": "stopping" if is_closing else "ok"}, status_code=503 if is_closing else 200)

    async def metrics(self) -> Response:
        """Show what was counted."""
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """List the one model."""
        check_key(request, self._key)
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def one_model(self, request: Request, name: str) -> Response:
        """Describe the model."""
        check_key(request, self._key)
        self._check_name(name)
        return JSONResponse(self._model_card())

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        arrived, body = time.perf_counter(), await self._body(request)
        check_messages(body)
        fields = self._fields(ChatFields, body)
        messages = [message.spoken() for message in fields.messages]
        prompt = await asyncio.to_thread(self._prompts.of_messages, messages, fields.asked().new_tokens)
        return await self._answered(request, fields, prompt, ChatAnswer, arrived)

    async def completions(self, request: Request) -> Response:
        """Continue a prompt."""
        arrived, body = time.perf_counter(), await self._body(request)
        fields = self._fields(CompletionFields, body)
        given, most = fields.single_prompt(), fields.asked().new_tokens
        prompt = await asyncio.to_thread(self._prompts.of_prompt, given, most, DEFAULT_NEW_TOKENS)
        return await self._answered(request, fields, prompt, CompletionAnswer, arrived)

    async def _body(self, request: Request) -> Any:
        check_key(request, self._key)
        return await read_json(request, self._limits.body_bytes)

    def _fields(self, kind: type[T], body: Any) -> T:
        fields = read_fields(kind, body)
        self._check_name(fields.model)
        if fields.asked().choices > self._limits.choices:
            raise Refusal(f"n: {self._limits.choices} choices at most are served.", param="n")
        return fields

    def _check_name(self, name: str) -> None:
        if name != self._name:
            message = f"There is no model {name!r} here, only {self._name!r}."
            raise Refusal(message, status=404, param="model", code="model_not_found")

    def _model_card(self) -> dict[str, Any]:
        card = {"id": self._name, "object": "model", "created": self._created, "owned_by": "hf_accel"}
        return card | {"max_model_len": self._prompts.context}

    async def _answered(
        self,
        request: Request,
        fields: Common,
        prompt: Prompt,
        kind: type[ChatAnswer | CompletionAnswer],
        arrived: float,
    ) -> Response:
        asked, path = fields.asked(), request.url.path
        generation = Generation(self._model, self._tokenizer, prompt, asked)
        steps = self._metrics.watch(len(prompt.tokens), arrived)
        outcome = self._pool.submit(generation, steps, bool(fields.stream))
        answer = kind(self._name, self._tokenizer, asked.choices, asked.logprobs is not None)
        reply = Reply(answer, outcome, len(prompt.tokens), lambda status: self._metrics.answered(path, status))
        return reply.stream(request, fields.includes_usage) if fields.stream else await reply.whole(request)

    async def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            refusal = Refusal(f"{request.method} {request.url.path}: {error.detail}.", status=error.status_code)
        else:
            refusal = failed(error)
        path = request.url.path if any(request.url.path == route.path for route in request.app.routes) else "other"
        self._metrics.answered(path, refusal.status)
        return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers())
