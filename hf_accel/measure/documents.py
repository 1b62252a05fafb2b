"""Whatever a user's text comes in, read as one document of token ids after the other.

Texts, conversations, token ids, a tokenizer's output with or without padding, tables of such columns (data sets, which
are read by what they offer and not imported), and anything that gives them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.failures import converting
from hf_accel.errors import ConfigError

COLUMNS = ("input_ids", "text", "messages")  # of a table; the first that it has is read


@dataclass(frozen=True)
class Document:
    """Token ids int64 [T] of one document, padding taken out; `is_text`: it came as a text."""

    ids: Tensor
    is_text: bool


@dataclass(frozen=True)
class Reader:
    """Reads documents.

    name: what the text is called in errors; ends: texts are ended by the tokenizer's end of text.
    """

    tokenizer: Any = None
    name: str = "Calibration"
    ends: bool = False

    def documents(self, given: Any) -> Iterator[Document]:
        """Yield the documents of `given`, in their order and as it gives them, so that it may have no end.

        Raises:
            ConfigError: it is no text, or an item of it is none; texts or conversations come without a tokenizer.
        """
        if isinstance(given, (str, Mapping, Tensor)) or _is_conversation(given) or _is_numbers(given):
            yield from self._item(given)
            return
        if not isinstance(given, Iterable):
            if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
                raise ConfigError(
                    f"{self.name} is texts, token ids [B, T], a tokenizer's output, a data set, or an iterable of "
                    f"them; {type(given).__name__} was given."
                )
            for index in range(len(given)):
                yield from self._item(given[index])
            return
        for item in given:
            yield from self._item(item)

    def _item(self, item: Any) -> Iterator[Document]:
        if isinstance(item, str):
            yield self._text(item)
        elif _is_conversation(item):
            yield self._conversation(item)
        elif isinstance(item, Mapping):
            yield from self._columns(item)
        else:
            yield from self._ids(item)

    def _columns(self, table: Mapping[str, Any]) -> Iterator[Document]:
        name = next((name for name in COLUMNS if table.get(name) is not None), None)
        if name is None:
            raise ConfigError(
                f"{self.name} has the columns {', '.join(map(str, table)) or 'of nothing'}; one of "
                f"{', '.join(COLUMNS)} is read. Of a data set in several splits give one."
            )
        value = table[name]
        if name == "input_ids":
            yield from self._ids(value, table.get("attention_mask"))
            return
        is_one = isinstance(value, str) or _is_conversation(value)
        if not is_one and not isinstance(value, Iterable):
            raise ConfigError(f"{self.name} has a {type(value).__name__} in its column {name!r}.")
        for item in [value] if is_one else value:
            if not (isinstance(item, str) if name == "text" else _is_conversation(item)):
                raise ConfigError(f"{self.name} has a {type(item).__name__} in its column {name!r}.")
            yield from self._item(item)

    def _text(self, text: str, **options: Any) -> Document:
        if self.tokenizer is None:
            raise ConfigError(f"{self.name} was given as strings; give the tokenizer, too (tokenizer=...).")
        with converting(ConfigError, f"{self.name} could not be tokenized"):
            ids = torch.as_tensor(self.tokenizer(text, verbose=False, **options)["input_ids"]).flatten().long()
        end = getattr(self.tokenizer, "eos_token_id", None)
        if self.ends and end is not None and ids[-1:].tolist() != [end]:
            ids = torch.cat([ids, torch.tensor([end])])
        return Document(ids, True)

    def _conversation(self, messages: Any) -> Document:
        if self.tokenizer is None:
            raise ConfigError(f"{self.name} was given as messages; give the tokenizer, too (tokenizer=...).")
        advice = "Give a tokenizer with a chat template, or texts."
        with converting(ConfigError, f"{self.name} has messages that could not be made a text", advice):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self._text(text, add_special_tokens=False)  # the template has them

    def _ids(self, value: Any, mask: Any = None) -> Iterator[Document]:
        """Yield each row of ids, where its mask, if there is one, is not 0."""
        rows, masks = self._rows(value), None if mask is None else self._rows(mask, is_mask=True)
        if masks is not None and [len(row) for row in rows] != [len(row) for row in masks]:
            raise ConfigError(f"{self.name} has an attention mask of another shape than its token ids.")
        for index, row in enumerate(rows):
            yield Document(row if masks is None else row[masks[index] != 0], False)

    def _rows(self, value: Any, is_mask: bool = False) -> list[Tensor]:
        if isinstance(value, Sequence) and not isinstance(value, str) and not _is_numbers(value):
            return [row for item in value for row in self._rows(item, is_mask)] or [torch.empty(0, dtype=torch.long)]
        try:
            found = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        is_whole = not found.is_floating_point() and found.dtype is not torch.bool
        if not (is_whole or is_mask) or found.dim() not in (1, 2):
            raise ConfigError(
                f"{self.name} has an item that is neither a text nor token ids [B, T] in whole numbers: "
                f"{type(value).__name__}" + (f" of shape {tuple(found.shape)}." if found.numel() else ".")
            )
        return list(found.long()[None] if found.dim() == 1 else found.long())


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, each with a role and a content."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return is_list and isinstance(value[0], Mapping) and "role" in value[0] and "content" in value[0]


def _is_numbers(value: Any) -> bool:
    """Return whether a value is token ids of one document, or an array of them."""
    if isinstance(value, Sequence):
        return len(value) > 0 and isinstance(value[0], Integral)
    return hasattr(value, "__array__")
