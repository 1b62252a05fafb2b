"""The text of a run: the user's, packed into windows without padding, or some that the teacher writes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_accel.errors import CheckpointError, ConfigError
from hf_accel.measure.documents import Reader
from hf_accel.measure.text import check_ids, own_text

MOST_TOKENS = 1 << 25  # read of one text: 134 MB
HELD_OUT_TOKENS, HELD_OUT_EVERY = 16384, 50  # where the user holds nothing out: every fiftieth window of the text
WRITTEN_ROWS = 32  # that the teacher writes at a time


@dataclass(frozen=True)
class Text:
    """Windows of token ids, int32 [N, W] to train on and [M, W] held out, and whether the teacher wrote them."""

    train: Tensor
    held_out: Tensor
    source: str
    is_own: bool = False


def token_ids(given: Any, tokenizer: Any, vocabulary: int, most: int, name: str = "text") -> Tensor:
    """Return the documents of `given` one behind the other, int32 [tokens]; not more than `most` tokens are read.

    Raises:
        ConfigError: it is neither texts nor token ids, or ids are outside the vocabulary.
    """
    parts, count = [], 0
    for document in Reader(tokenizer, name, ends=True).documents(given):
        check_ids(document.ids, vocabulary, name)
        parts.append(document.ids.to(torch.int32))
        count += len(document.ids)
        if count >= most:
            break
    return torch.cat(parts)[:most] if parts else torch.empty(0, dtype=torch.int32)


def packed(ids: Tensor, window: int) -> Tensor:
    """Return ids [tokens] as rows [N, window]; the rest that fills no row is left out."""
    return ids[: len(ids) // window * window].view(-1, window)


def given_text(text: Any, held_out: Any, tokenizer: Any, vocabulary: int, window: int, most: int) -> Text:
    """Return the user's text as windows; without `held_out` every fiftieth window of the text is held out.

    Raises:
        ConfigError: a text is of another kind, or too short.
    """
    ids = token_ids(text, tokenizer, vocabulary, min(MOST_TOKENS, most))
    rows = packed(ids, window)
    if held_out is None:
        if len(rows) < 2:
            raise ConfigError(f"text has {len(ids)} tokens; two windows of {window} are needed, one to hold out.")
        return _split(rows, window, "every fiftieth window of the text")
    kept = packed(token_ids(held_out, tokenizer, vocabulary, HELD_OUT_TOKENS, "held_out"), window)
    for name, found in (("text", rows), ("held_out", kept)):
        if not len(found):
            raise ConfigError(
                f"{name} has less than one window of {window} tokens. Give more text or a smaller window."
            )
    return Text(rows, kept, "the held-out text")


def _split(rows: Tensor, window: int, source: str, is_own: bool = False) -> Text:
    is_held = torch.arange(len(rows)) % HELD_OUT_EVERY == min(HELD_OUT_EVERY, len(rows)) - 1
    held = rows[is_held]
    keep = max(1, HELD_OUT_TOKENS // window)
    chosen = torch.linspace(0, len(held) - 1, min(keep, len(held))).round().long()
    return Text(rows[~is_held], held[chosen], source, is_own)


def written_text(teacher: Any, window: int, most: int, seed: int, until: float, kept: Path | None) -> Text:
    """Return text that the teacher samples: at least two rows of one window, up to `most` tokens or the time `until`.

    The same seed gives the same text, as far as the time reaches. It is kept in the file `kept`, and read from there.

    Raises:
        CheckpointError: the file is damaged.
    """
    if kept is not None and kept.exists():
        try:
            return _split(torch.load(kept, weights_only=True), window, "the teacher's own text", True)
        except Exception as error:
            raise CheckpointError(f"{kept} is damaged; delete it, and the run's checkpoints with it.") from error
    parts: list[Tensor] = []
    rows = max(2, min(WRITTEN_ROWS, -(-most // window)))
    while not parts or (sum(map(torch.numel, parts)) < most and time.monotonic() < until):
        parts.append(own_text(teacher, rows, window - 1, seed + len(parts)).ids.to("cpu", torch.int32))
    rows_of_text = torch.cat(parts)
    if kept is not None:
        part = kept.with_suffix(".part")
        torch.save(rows_of_text, part)
        part.replace(kept)
    return _split(rows_of_text, window, "the teacher's own text", True)


class Windows(Dataset):
    """Windows in the order of training: item i is one of a shuffled pass, each pass shuffled anew from the seed.

    So the position in the data is a number, and a resumed run reads what it would have read.
    """

    def __init__(self, rows: Tensor, seed: int, length: int) -> None:
        self.rows, self.seed, self.length = rows, seed, length
        self.shuffled = -1
        self.order = torch.empty(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self.shuffled:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order, self.shuffled = torch.randperm(len(self.rows), generator=generator), epoch
        return {"input_ids": self.rows[self.order[place]].long()}
