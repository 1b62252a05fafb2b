"""The text on which quality is measured: the user's, or some that the model writes itself.

A model's own samples are the text that it will be asked for, and need no data; they say nothing about perplexity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hf_accel.core.journal import Journal
from hf_accel.errors import ConfigError
from hf_accel.measure.documents import Reader
from hf_accel.measure.quality import CalibrationText

ROW_TOKENS, FITTED_ROW_TOKENS = 256, 512  # of rows of texts to measure on, and of those that something is fitted to
MOST_TOKENS = 1 << 20  # of a text that are read
ROWS, TOKENS = 4, 64  # of own text: 252 predictions put the error of a mean KL at some percent of it


def calibration_text(
    model: Any, given: Any = None, tokenizer: Any = None, *, row_tokens: int = ROW_TOKENS
) -> CalibrationText:
    """Return calibration text for `model`, in rows of one length and without padding.

    Rows of token ids of one length stay as they are, but for those longer than the model can read, which are cut.
    Texts, and rows of several lengths, also those that a mask says are padded, are laid end to end and cut into rows;
    what is left at the end is lost. Of more than 2^20 tokens the first are read.

    Args:
        given: token ids [B, T]; rows of token ids; a tokenizer's output (`input_ids`, `attention_mask`); texts or
            conversations, with `tokenizer`; a data set with a column "input_ids", "text" or "messages"; a generator of
            any of these; what this function returned. None: the model writes the text.
        row_tokens: into rows of how many tokens texts are cut, at most.

    Raises:
        ConfigError: `given` is something else, has fewer than two tokens, or is not in the model's vocabulary.
    """
    if given is None:
        return own_text(model, ROWS, min(TOKENS, context_tokens(model) - 1))
    if isinstance(given, CalibrationText):
        return given
    room, vocabulary = context_tokens(model), model.config.get_text_config(decoder=True).vocab_size
    _check_tokenizer(tokenizer, vocabulary)
    parts, count, are_texts = [], 0, False
    for document in Reader(tokenizer).documents(given):
        check_ids(document.ids, vocabulary)
        parts.append(document.ids)
        are_texts |= document.is_text
        count += len(document.ids)
        if count >= MOST_TOKENS:
            break
    source = "the text given" if count <= MOST_TOKENS else f"the first {MOST_TOKENS:,} tokens of the text given"
    lengths = {len(part) for part in parts}
    if len(lengths) == 1 and not are_texts and count <= MOST_TOKENS:
        ids = _cut(torch.stack(parts), room)
    else:
        joined = torch.cat(parts)[:MOST_TOKENS] if parts else torch.empty(0, dtype=torch.long)
        ids = _cut(joined[None], min(room, row_tokens))
    if ids.shape[1] < 2 or not len(ids):
        raise ConfigError(
            f"Calibration has {count} tokens in {len(parts)} texts or rows of token ids; a row has two or more. Give "
            "more text."
        )
    return CalibrationText(ids, source, False)


def check_ids(ids: Tensor, vocabulary: int, name: str = "Calibration") -> None:
    """Raise unless all token ids are in the vocabulary.

    Raises:
        ConfigError: one is not.
    """
    if not len(ids):
        return
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ConfigError(
            f"{name} has token ids outside the model's vocabulary of {vocabulary}: {wrong}. Give text in this model's "
            "tokens, or the tokenizer that belongs to it."
        )


def _check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Raise if a tokenizer cannot be the model's; tokens that a user added to it are not counted."""
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int) and size > vocabulary:
        raise ConfigError(
            f"The tokenizer has {size} tokens, and the model's vocabulary has {vocabulary}: it is another model's. "
            "Give the tokenizer that belongs to the model."
        )


def _cut(rows: Tensor, room: int) -> Tensor:
    """Return rows [B, T] in rows of up to `room` tokens; what is left of a row is lost."""
    length = min(room, rows.shape[1])
    count = rows.shape[1] // max(1, length)
    return rows[:, : count * length].reshape(-1, length) if length else rows[:0]


def context_tokens(model: Any) -> int:
    """Return how many tokens a model can read at most."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096


def own_text(model: Any, rows: int, tokens: int, seed: int = 0) -> CalibrationText:
    """Sample rows of `tokens` new tokens from the model, the same ones every time for the same seed."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    start = model.generation_config.bos_token_id
    start = start[0] if isinstance(start, list) else start
    journal = Journal()
    journal.set_attribute(model, "generation_config", GenerationConfig())  # the model's own may ask for other text
    try:
        ids = _sampled(model, start, vocabulary, rows, tokens, seed)
    finally:
        journal.undo()
    return CalibrationText(ids, "the model's own samples", True)


def _sampled(model: Any, start: int | None, vocabulary: int, rows: int, tokens: int, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(vocabulary, (rows, 1)) if start is None else torch.full((rows, 1), start)
        first = first.to(model.device)
        return model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
