"""Quantization-aware training by distillation: the original teaches its own rounded copy, which is then deployed.

Rounding to 2 or 3 bits loses what no choice of codes brings back by itself; trained for some minutes towards the
original's distributions, weights and scales make up for most of it (Esser et al. 2020, arXiv:1902.08153; Liu et al.
2025, arXiv:2502.02631: at 3 and 4 bits training compensates, at 2 bits it learns anew).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model.shadow import twin
from hf_accel.core.model.support import unwrap
from hf_accel.core.progress import shown
from hf_accel.core.steps.applying import apply
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, ConflictError, UnsupportedModelError
from hf_accel.measure.quality import Quality
from hf_accel.measure.text import FITTED_ROW_TOKENS, calibration_text, context_tokens
from hf_accel.quantization.deploying import convert_qat
from hf_accel.quantization.learned import trained_products
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear
from hf_accel.quantization.qat import SECTION, QATConfig
from hf_accel.recipes.result import Uptrained
from hf_accel.recipes.texts import packed, token_ids
from hf_accel.recipes.uptrain import BATCH_TOKENS, uptrain

WINDOW_TOKENS = 256  # rounding errors depend little on the position, and attention costs less
NOISE = 0.26  # of the width of a code: how far noise may move a weight in a run
CALIBRATION_TOKENS = 65536
FEWEST_STEPS = 100  # in fewer, steps of AdamW add up: their directions depend on one another
USUAL_STEPS = 1000  # where the number of steps is not known at the beginning


@dataclass(frozen=True)
class QuantizationAware:
    """What `qat` made of a model: `uptrained` has what was measured, `shares` of weights say what became of codes."""

    model: Any
    uptrained: Uptrained
    shares: dict[str, float]  # "changed", "clipped", "outermost"

    @property
    def before(self) -> Quality:
        """Return the quality at the start of training: rounded, not trained."""
        return self.uptrained.before

    @property
    def after(self) -> Quality:
        """Return the quality after it."""
        return self.uptrained.after

    def __str__(self) -> str:
        closed = 1 - self.after.kl / self.before.kl if self.before.kl else 0.0
        told = ", ".join(f"{name} {100 * share:.2f} %" for name, share in self.shares.items())
        return f"{self.uptrained}\n  {100 * closed:.0f} % of the KL of the start closed; codes: {told}"


def qat(
    model: Any,
    config: QATConfig,
    text: Any = None,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    converts: bool = True,
    learning_rate: float | None = None,
    window: int | None = None,
    hidden_weight: float | None = 1.0,
    **options: Any,
) -> QuantizationAware:
    """Train `model` in few bits towards what it was, in place, and pack the result.

    The original weights stay in memory: the teacher computes with them, and `hf_accel.restore` puts them back. Beside
    them the run takes 17 bytes per trained weight (the weight in fp32, its gradient, AdamW's two moments, the code of
    the start), and what `uptrain` says of logits. If anything goes wrong, the model is restored.

    Args:
        model: a causal language model of transformers with its original weights, neither optimised nor quantized.
        config: bits, groups and where to start.
        text, tokenizer: what to train on, as in `uptrain`; None: the model writes it.
        calibration: text for a start that is calibrated, as for `hf_accel.optimize`; None: the first 65,536 tokens of
            `text`, where it can be read twice.
        converts: pack the trained products at the end; False leaves them in training, for more of it.
        learning_rate: None: from the width of codes and the number of steps, see `NOISE`; with `lora_rank` as in
            `uptrain`.
        window: tokens per window; None: 256.
        hidden_weight: see `uptrain`. Gradients of hidden states are less noisy than those of distributions, and noise
            flips codes.
        options: all others of `uptrain`: minutes, tokens or steps, held_out, out, lora_rank, seed, callbacks, ....

    Raises:
        ConflictError: the model is optimised already.
        Others: as `hf_accel.optimize`, `uptrain` and `hf_accel.convert_qat`.
    """
    if not isinstance(config, QATConfig):
        raise ConfigError(f"config is a QATConfig; {type(config).__name__} was given.")
    if refused := {"student", "teacher"} & options.keys():
        raise ConfigError(f"{', '.join(sorted(refused))} cannot be given: the model is trained towards what it was.")
    original = unwrap(model)
    if host_of(original) is not None:
        raise ConflictError("The model is optimised by hf_accel. Call hf_accel.restore(model) before.")
    teacher = twin(original)
    if teacher is original:
        raise UnsupportedModelError(
            f"This {type(original).__name__} cannot be copied without its weights, which its teacher needs. Use "
            "hf_accel.optimize with the config, and hf_accel.recipes.uptrain with a second model as the teacher."
        )
    setting = Setting.of(original)
    if calibration is None:
        calibration = _beginning(text, tokenizer, original)
    if calibration is not None:
        setting.calibration = calibration_text(original, calibration, tokenizer, row_tokens=FITTED_ROW_TOKENS)
    with shown(f"preparing {type(original).__name__}") as setting.progress:
        host = apply(Plan.of([config]), setting)
    try:
        chosen_window = window or WINDOW_TOKENS
        if learning_rate is None and options.get("arguments") is None and options.get("lora_rank") is None:
            learning_rate = _rate(
                (module for _, _, _, module in trained_products(original)), _steps(options, chosen_window)
            )
        from hf_accel.recipes.qat_callback import QATCallback  # with transformers.Trainer: seconds

        callbacks = [QATCallback(), *options.pop("callbacks", ())]
        result = uptrain(
            original, teacher, text, tokenizer=tokenizer, learning_rate=learning_rate, window=chosen_window,
            hidden_weight=hidden_weight, callbacks=callbacks, **options,
        )  # fmt: skip
        section: Any = host.report.sections[SECTION]
        shares = {name: section.share(name) for name in ("changed", "clipped", "outermost")}
        if converts:
            convert_qat(original)
        host.report.quality = result.after
    except BaseException:
        host.journal.undo()
        raise
    return QuantizationAware(model, result, shares)


def _beginning(text: Any, tokenizer: Any, model: Any) -> Tensor | None:
    """Return rows of the first tokens of a text; None where there is none, or it can be read once only."""
    if text is None or isinstance(text, Iterator):
        return None
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = token_ids(text, tokenizer, vocabulary, CALIBRATION_TOKENS)
    rows = packed(ids, max(1, min(FITTED_ROW_TOKENS, context_tokens(model), len(ids))))
    return rows.long() if rows.numel() > 1 else None


def _steps(options: Mapping[str, Any], window: int) -> int:
    """Return how many steps `uptrain` will make with these options, or how many are usual."""
    if options.get("tokens") is not None:
        return int(options["tokens"]) // ((options.get("batch_size") or max(1, BATCH_TOKENS // window)) * window)
    return int(options.get("steps") or USUAL_STEPS)


def _rate(products: Iterable[FakeQuantizedLinear], steps: int) -> float:
    """Return the learning rate with which noise moves weights by `NOISE` of the width of their codes.

    AdamW moves a weight whose gradient is noise by about rate · sqrt(steps). Where that is more than the distance that
    codes are kept from their borders, they flip at random, and the model gets worse before it gets better.
    """
    widths = torch.cat([product.start_scales.abs().flatten() for product in products])
    return NOISE * float(widths.median()) / math.sqrt(max(FEWEST_STEPS, steps))
