"""The fields of a completion request: a prompt that is continued as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from hf_accel.endpoint.asked import Asked
from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.fields import Common

DEFAULT_NEW_TOKENS = 16  # OpenAI's, of this kind of request alone; fewer where fewer fit


class CompletionFields(Common):
    """The fields of a completion request."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def asked(self) -> Asked:
        """Return what is asked for."""
        return replace(super().asked(), new_tokens=self.max_tokens, logprobs=self.logprobs)

    def single_prompt(self) -> str | list[int]:
        """Return the prompt: a text or tokens.

        Raises:
            Refusal: there are several.
        """
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return self.prompt  # type: ignore[return-value]
        if len(self.prompt) != 1:
            raise Refusal(
                f"prompt: one prompt per request is served, {len(self.prompt)} were given; send a request for each.",
                param="prompt",
            )
        return self.prompt[0]  # type: ignore[return-value]
