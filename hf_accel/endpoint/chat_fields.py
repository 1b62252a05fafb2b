"""The fields of a chat request, and the messages in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hf_accel.endpoint.asked import Asked
from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.fields import Common

MOST_ALTERNATIVES = 20


class Part(BaseModel):
    """A part of a message; only text is served."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; None is said by leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def spoken(self) -> dict[str, str]:
        """Return the message as chat templates take it: parts are lines of one text."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatFields(Common):
    """The fields of a chat request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    def asked(self) -> Asked:
        """Return what is asked for.

        Raises:
            Refusal: fields contradict one another.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refusal("max_tokens is the old name of max_completion_tokens; give one.", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal("top_logprobs belongs to logprobs=true.", param="top_logprobs")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return replace(super().asked(), new_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


def check_messages(body: Any) -> None:
    """Refuse what messages may hold elsewhere: calls of tools and their results, images, sound and files.

    Raises:
        Refusal: there is some; all else that does not fit is found when the fields are read.
    """
    messages = body.get("messages") if isinstance(body, dict) else None
    for place, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        where = f"messages[{place}]"
        if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            raise Refusal(f"{where}: tool calls are not served.", param=where, code="unsupported_parameter")
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else []:
            kind = part.get("type") if isinstance(part, dict) else "text"
            if kind != "text":
                raise Refusal(
                    f"{where}.content: parts of type {kind!r} are not served; the model reads text.",
                    param=f"{where}.content",
                    code="unsupported_content",
                )
        for name in [name for name, value in message.items() if value is None]:
            del message[name]
