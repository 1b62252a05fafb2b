"""The text on which quality is measured: the user's, or some that the model writes itself.

A model's own samples are the text that it will be asked for, and need no data; they say nothing about perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from hf_accel.core.journal import Journal
from hf_accel.errors import ConfigError
from hf_accel.measure.quality import CalibrationText

ROW_TOKENS, FITTED_ROW_TOKENS = 256, 512  # of rows of texts to measure on, and of those that something is fitted to
ROWS, TOKENS = 4, 64  # of own text: 252 predictions put the error of a mean KL at some percent of it


def calibration_text(
    model: Any, given: Any = None, tokenizer: Any = None, *, row_tokens: int = ROW_TOKENS
) -> CalibrationText:
    """Return calibration text for `model`.

    Args:
        given: token ids [B, T]; a tokenizer's output (`input_ids`, no padding); a text or several, with `tokenizer`;
            None: the model writes it.
        row_tokens: into rows of how many tokens texts are cut, at most.

    Raises:
        ConfigError: `given` is something else, or has fewer than two tokens in a row.
    """
    if given is None:
        return own_text(model, ROWS, min(TOKENS, context_tokens(model) - 1))
    room = context_tokens(model)
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        mask = given.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ConfigError("Calibration text has padding. Give rows of one length, or texts with a tokenizer.")
        given = given.get("input_ids")
    if isinstance(given, Sequence) and given and all(isinstance(text, str) for text in given):
        if tokenizer is None:
            raise ConfigError("Calibration text was given as strings; give the tokenizer, too (tokenizer=...).")
        joined = torch.cat([torch.as_tensor(tokenizer(text)["input_ids"]).flatten().long() for text in given])
        length = min(room, row_tokens, len(joined))
        given = joined[: len(joined) // max(1, length) * length].view(-1, max(1, length))
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[1] < 2 or ids.shape[0] < 1 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise ConfigError(
            "Calibration is token ids [B, T] with T >= 2, a tokenizer's output, or texts with a tokenizer; "
            f"{type(given).__name__} of shape {tuple(ids.shape)} was given."
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ConfigError(f"Calibration has token ids outside the model's vocabulary of {vocabulary}.")
    return CalibrationText(ids[:, :room], "the text given", False)


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


def _sampled(model: Any, start: int | None, vocabulary: int, rows: int, tokens: int, seed: int) -> torch.Tensor:
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(vocabulary, (rows, 1)) if start is None else torch.full((rows, 1), start)
        first = first.to(model.device)
        return model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
