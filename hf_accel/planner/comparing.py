"""What an optimised model is compared with: distributions on text that was given, and logits on text to verify on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_accel.core.calls.call import CallLog
from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.model.anatomy import is_packed
from hf_accel.core.steps.patcher import Fidelity, Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError, VerificationError
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.measure.reference import Reference
from hf_accel.measure.text import FITTED_ROW_TOKENS, ROW_TOKENS, calibration_text
from hf_accel.ops.tolerances import of_text_logits


def text_for(setting: Setting, configs: Sequence[Config], calibration: Any, tokenizer: Any) -> CalibrationText | None:
    """Return the text that was given, if any; the setting keeps what steps are fitted to."""
    if calibration is None:
        return None
    is_fitted = _is_fitted(configs)
    with converting(UnsupportedModelError, "The model's distributions on the calibration text cannot be had"):
        row_tokens = FITTED_ROW_TOKENS if is_fitted else ROW_TOKENS
        text = calibration_text(setting.model, calibration, tokenizer, row_tokens=row_tokens)
        setting.calibration = text.split()[0] if is_fitted else text
    return text


def measured_on(setting: Setting, text: CalibrationText, configs: Sequence[Config]) -> QualityReference:
    """Return what the model is compared with on the part of the text that nothing is fitted to."""
    with converting(UnsupportedModelError, "The model's distributions on the calibration text cannot be had"):
        return QualityReference(setting.model, text.split()[1] if _is_fitted(configs) else text)


def _is_fitted(configs: Sequence[Config]) -> bool:
    return any(Patcher.for_config(config).is_fitted_to_text for config in configs)


def quality_of(
    setting: Setting, configs: Sequence[Config], calibration: Any, tokenizer: Any
) -> QualityReference | None:
    """Return what configs are measured by, where text is given, apart from what steps are fitted to."""
    text = text_for(setting, configs, calibration, tokenizer)
    return None if text is None else measured_on(setting, text, configs)


def logits_on(setting: Setting, verify_on: Any) -> Reference | None:
    """Return the logits of the model on the text to verify on, if one was given.

    Raises:
        ConfigError: the model cannot continue it.
    """
    if verify_on is None:
        return None
    with converting(ConfigError, "The model itself cannot continue the text given as verify_on"):
        return Reference(setting.model, verify_on)


def verify(reference: Reference | None, alone: Reference | None, host: Host) -> None:
    """Compare logits with the original's, and with those of the model with the configs `alone` that were named."""
    if reference is None:
        return
    lossy = {type(step.config).__name__ for step in host.report.applied if step.fidelity == Fidelity.LOSSY.value}
    dtype, packed = reference.model.dtype, is_packed(reference.model)
    found = [_difference(reference, host, math.inf if lossy else of_text_logits(dtype, packed), "")]
    if alone is not None:  # the configs were lossy, or close: weights or what the cache keeps are rounded in both
        bound = math.inf if lossy - set(host.report.named) else of_text_logits(dtype, is_rounded=True)
        found.append(_difference(alone, host, bound, f" from those with {', '.join(host.report.named)} alone"))
    host.calls = host.report.calls = CallLog()  # the calls that verified are none of the user's
    host.report.verified = "logits differ by " + ", ".join(found)


def _difference(reference: Reference, host: Host, bound: float, whose: str) -> str:
    """Return in words how far the logits are from the reference's; the model is restored where that is too far."""
    try:
        with converting(VerificationError, "The optimised model could not be verified, and has been restored"):
            difference = reference.difference()
        if not difference <= bound:
            raise VerificationError(
                f"On the verification text the logits differ by {difference:.1e} of their norm{whose}; rounding "
                f"explains {bound:.0e}. The model has been restored."
            )
    except BaseException:
        host.journal.undo()
        raise
    promised = "lossy steps promise no bound" if bound == math.inf else f"bound {bound:.0e}"
    return f"{difference:.1e} of their norm{whose} ({promised})"
