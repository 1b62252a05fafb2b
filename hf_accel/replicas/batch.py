"""Texts for a list of texts in one call of `generate`, padded on the left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from hf_accel.errors import ConfigError


def texts_of(model: Any, tokenizer: Any, rows: Sequence[Any], seed: int, options: dict[str, Any]) -> list[str]:
    """Return for each text what follows on it; drawn, if tokens are drawn, after `torch.manual_seed(seed)`.

    Raises:
        ConfigError: a row is no text, or an empty one.
        Others: as `generate`.
    """
    for row in rows:
        if not isinstance(row, str) or not row:
            raise ConfigError(f"A row holds {row!r}; it is a text of one character or more.")
    inputs = _left(tokenizer)(list(rows), return_tensors="pt", padding=True, return_token_type_ids=False)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    options = {"pad_token_id": _left(tokenizer).pad_token_id, **options}
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        found = model.generate(**inputs, **options)
    ids = found if isinstance(found, torch.Tensor) else found.sequences
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _left(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that pads on the left, with its end of text where it has no padding."""
    found = copy.copy(tokenizer)
    found.padding_side = "left"
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found
