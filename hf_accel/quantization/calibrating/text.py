"""The text that weights are calibrated on, in rows of one length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_accel.errors import ConfigError
from hf_accel.measure.quality import CalibrationText
from hf_accel.measure.text import FITTED_ROW_TOKENS, context_tokens, own_text

LEAST_TEXT_TOKENS = 64
# that the model writes where there is no text: so many for each input of the widest product, within bounds
OWN_TOKENS_PER_INPUT, FEWEST_OWN_TOKENS, MOST_OWN_TOKENS = 8, 512, 8192
_OWN_ROWS = 8  # at least: rows are written together


def text_for(model: Any, given: CalibrationText | None, widest: int) -> CalibrationText:
    """Return the text: `given`, in rows of up to 512 tokens, or what the model writes; `widest`: inputs of a product.

    Raises:
        ConfigError: there is too little of it to calibrate on.
    """
    if given is None:
        wanted = own_tokens(widest)
        length = min(FITTED_ROW_TOKENS, context_tokens(model) - 1, wanted // _OWN_ROWS)
        return own_text(model, -(-wanted // length), length)
    if given.ids.numel() < LEAST_TEXT_TOKENS:
        raise ConfigError(
            f"Calibration text of {given.ids.numel()} tokens (about a fifth may be kept back to measure on) tells too "
            f"little; give {LEAST_TEXT_TOKENS} or more, and better some ten thousand."
        )
    return CalibrationText(_rows(given.ids), given.source, given.is_own)


def own_tokens(widest: int) -> int:
    """Return how many tokens a model writes where there is no text, for products of so many inputs."""
    return max(FEWEST_OWN_TOKENS, min(MOST_OWN_TOKENS, OWN_TOKENS_PER_INPUT * widest))


def _rows(ids: Tensor) -> Tensor:
    """Return ids [B, T] in rows of up to 512 tokens; what is left of a row is lost."""
    length = min(FITTED_ROW_TOKENS, ids.shape[1])
    count = ids.shape[1] // length
    return ids[:, : count * length].reshape(-1, length)


def notes_on(text: CalibrationText, widest: int) -> list[str]:
    """Return sentences on what the text is, and whether it is little for products of up to so many inputs."""
    count = text.ids.numel()
    found = [f"calibrated on {count:,} tokens of {text.source}, {len(text.ids)} rows of {text.ids.shape[1]}"]
    if count < widest:
        found.append(
            f"that is fewer tokens than the {widest:,} inputs of the widest product: their Hessians are known in "
            "part only; more text gives better codes"
        )
    return found
