"""From messages or a prompt to the tokens that the model reads, within its context."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.limits import Limits
from hf_accel.errors import described

_CONTEXT = 4  # tokens before the text that show how its first one is spelled (with a space before it, or without)


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    tokens: of the prompt. before: the last of them, where the text is to go on right behind. new_tokens: at most.
    """

    tokens: list[int]
    before: list[int]
    new_tokens: int


class Prompts:
    """Makes prompts; any thread may call any method at any time."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits) -> None:
        config = model.config.get_text_config(decoder=True)
        self._tokenizer, self._limits = tokenizer, limits
        self._vocabulary = int(config.vocab_size)
        found = limits.context_tokens or getattr(config, "max_position_embeddings", None)
        self.context: int | None = None if found is None else int(found)
        self._lock = threading.Lock()  # tokenizers change settings of their own while they read

    def of_messages(self, messages: list[dict[str, str]], new_tokens: int | None) -> Prompt:
        """Return messages as the tokenizer's chat template writes them, and the beginning of an answer.

        Raises:
            Refusal: there is no template, it does not take these messages, or they do not fit the context.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise Refusal(
                "The tokenizer of this model has no chat template, so messages cannot be made a prompt; "
                "use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # templates raise what they like about roles and their order
            raise Refusal(
                f"The chat template does not take these messages ({described(error)}).", param="messages"
            ) from error
        return self._fitting(tokens, [], new_tokens, "messages")

    def of_prompt(self, prompt: str | list[int], new_tokens: int | None, default: int) -> Prompt:
        """Return a prompt that is continued as it is; by `default` tokens at most where no number is given.

        Raises:
            Refusal: a token is not in the vocabulary, or the prompt does not fit the context.
        """
        if isinstance(prompt, str):
            with self._lock:
                tokens = self._tokenizer(prompt)["input_ids"]
        elif wrong := [token for token in prompt if not 0 <= token < self._vocabulary]:
            raise Refusal(f"prompt: the model has no token {wrong[0]} (of {self._vocabulary}).", param="prompt")
        else:
            tokens = prompt
        return self._fitting(tokens, tokens[-_CONTEXT:], new_tokens, "prompt", default)

    def _fitting(
        self, tokens: list[int], before: list[int], new_tokens: int | None, param: str, default: int | None = None
    ) -> Prompt:
        if not tokens:
            raise Refusal(f"{param}: there is not one token in it.", param=param)
        most = self._limits.new_tokens
        if new_tokens is not None and most is not None and new_tokens > most:
            raise Refusal(f"max_tokens: {new_tokens} were asked for, {most} are served.", param="max_tokens")
        room = None if self.context is None else self.context - len(tokens)
        if room is not None and (room < 1 or (new_tokens or 0) > room):
            asked = "" if new_tokens is None else f" and {new_tokens} new ones were asked for"
            raise Refusal(
                f"The context is {self.context} tokens; the {param} {'have' if param == 'messages' else 'has'} "
                f"{len(tokens)}{asked}. Shorten it, or ask for fewer.",
                param=param,
                code="context_length_exceeded",
            )
        bounds = [bound for bound in (default if new_tokens is None else new_tokens, most, room) if bound is not None]
        if not bounds:
            raise Refusal("max_tokens: this model has no bound of its own, so name one.", param="max_tokens")
        return Prompt(tokens, before, min(bounds))
