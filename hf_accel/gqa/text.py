"""The text on which heads are aligned and repaired, in rows that are read together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import ConfigError
from hf_accel.gqa.config import GQAConfig
from hf_accel.gqa.converting import BATCH, kept_back, least_tokens
from hf_accel.gqa.heads import layers_of
from hf_accel.measure.quality import CalibrationText
from hf_accel.measure.text import FITTED_ROW_TOKENS, calibration_text, context_tokens, own_text

LEAST_ROW_TOKENS = 16
LEAST_ROWS = 8  # to fit to, to choose by and to measure on
OWN_TOKENS = 7168  # that the model writes, at least


def text_for(model: Any, config: GQAConfig, given: CalibrationText | None) -> CalibrationText:
    """Return the calibration text of a conversion in rows [N, T], N a multiple of BATCH.

    It is the config's; else `given`, the session's; else what the model writes.

    Raises:
        ConfigError: token ids do not fit the model, or there are too few.
    """
    least = least_tokens(layers_of(model), model.config)
    if config.calibration is not None:
        given = calibration_text(model, torch.tensor(config.calibration))
    if given is None:
        length = min(FITTED_ROW_TOKENS, context_tokens(model) - 1)
        rows = -(-max(OWN_TOKENS, least * 3 // 2) // length)
        given = own_text(model, -(-rows // BATCH) * BATCH, length)
    return _rows(given, least)


def _rows(given: CalibrationText, least: int) -> CalibrationText:
    ids = _windows(given.ids)
    found = (len(ids) - kept_back(len(ids)) * BATCH) * ids.shape[1] if len(ids) else 0
    if found < least:
        raise ConfigError(
            f"Calibration text of {given.ids.numel()} tokens leaves {max(0, found)} to fit output projections to (in "
            f"whole rows of up to {FITTED_ROW_TOKENS}, some kept back); their least squares need {least}, a token for "
            f"each input, and at least {LEAST_ROWS} rows (longer ones are cut, down to {LEAST_ROW_TOKENS} tokens). "
            "Give more text."
        )
    return CalibrationText(ids, given.source, given.is_own)


def texts_for(
    model: Any, config: GQAConfig, given: CalibrationText | None
) -> tuple[CalibrationText | None, CalibrationText]:
    """Return the text to convert with, None for the methods that need none, and that to measure on.

    Raises:
        ConfigError: as `text_for`, where a method needs text.
    """
    if config.method == "aligned":
        fitted, rest = text_for(model, config, given).split(BATCH)
        return _rows(fitted, least_tokens(layers_of(model), model.config)), rest
    if config.calibration is not None:
        return None, calibration_text(model, torch.tensor(config.calibration))
    return None, calibration_text(model) if given is None else given


def _windows(ids: Tensor) -> Tensor:
    """Return rows of up to FITTED_ROW_TOKENS, shorter where there are few, as many as make whole batches."""
    length = min(FITTED_ROW_TOKENS, ids.shape[1])
    while length >= 2 * LEAST_ROW_TOKENS and len(ids) * (ids.shape[1] // length) < LEAST_ROWS:
        length //= 2
    count = ids.shape[1] // length
    rows = ids[:, : count * length].reshape(-1, length)
    if len(rows) < LEAST_ROWS:
        return rows[:0]
    return rows[: len(rows) // BATCH * BATCH]
