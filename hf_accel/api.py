"""The verbs: optimize, restore, optimized, plan, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from hf_accel.core.calls.call import CallLog
from hf_accel.core.calls.hosting import Host, host_of
from hf_accel.core.calls.report import Report
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.model.support import unwrap
from hf_accel.core.progress import shown
from hf_accel.core.steps.applying import Patchers, apply, checked
from hf_accel.core.steps.patcher import Fidelity, Patcher, Stage
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, ConflictError, UnsupportedModelError, VerificationError
from hf_accel.measure.quality import QualityReference
from hf_accel.measure.reference import Reference
from hf_accel.measure.text import FITTED_ROW_TOKENS, ROW_TOKENS, calibration_text
from hf_accel.ops.tolerances import of_text_logits
from hf_accel.planner import plan_goal

M = TypeVar("M")
Goal = str | Config | Sequence[Config] | Plan


def plan(
    model: Any,
    goal_or_configs: Goal = "exact",
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    max_kl: float | None = None,
    draft_model: Any = None,
) -> Plan:
    """Return what `optimize` would do, having changed nothing. Print it, edit `steps`, keep it as JSON.

    Args:
        model: a transformers causal language model, a PeftModel around one, or a text-generation pipeline.
        goal_or_configs: a goal ("exact": the same mathematics up to rounding; "fast": weights in few bits, too, within
            `max_kl`; "memory": the fewest bytes within `max_kl`), or one or several configs.
        calibration: the text on which lossy steps are measured, and which some are fitted to: token ids [B, T], rows
            of token ids, a tokenizer's output, texts or conversations with `tokenizer`, a data set, or a generator of
            these; padding that a mask shows is taken out. None: a goal lets the model write some itself; configs are
            not measured.
        tokenizer: for calibration given as texts or conversations.
        max_kl: what a lossy goal may cost, in nats per token of the original's text; None: 0.05 for "fast", 0.2 for
            "memory".
        draft_model: see `optimize`; the plan keeps it.

    Raises:
        UnsupportedModelError: the model cannot be optimised.
        ConflictError: it is optimised already.
        ConfigError: the goal, a config or an argument does not exist or does not fit.
    """
    setting = _setting(model, draft_model)
    with shown(f"planning for {type(setting.model).__name__}") as setting.progress:
        chosen = _plan(setting, goal_or_configs, calibration, tokenizer, max_kl)
        if chosen.patchers is not None:
            found = [patcher.preview(setting) for patcher in chosen.patchers]
            chosen.plan.previews = [preview for preview in found if preview is not None]
        return chosen.plan


def optimize(
    model: M,
    goal_or_configs: Goal = "exact",
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    max_kl: float | None = None,
    draft_model: Any = None,
    verify_on: Any = None,
    originals: str = "keep",
    progress: Callable[[], None] | None = None,
) -> M:
    """Make `model.generate` fast, in place, and return the same object. `restore` takes everything back.

    Args:
        model: a transformers causal language model, a PeftModel around one, or a text-generation pipeline.
        goal_or_configs: a goal ("exact", "fast" or "memory"), one or several configs, or an edited `Plan`.
        calibration, tokenizer, max_kl: how lossy steps are measured and bounded, see `plan`.
        draft_model: a smaller model with the same tokenizer, which `SpeculativeConfig` may draft with. It is not
            changed, and is kept until `restore`.
        verify_on: token ids [B, T], or a tokenizer's output, on which the logits before and after are compared.
            With lossy steps the difference is reported and has no bound.
        originals: what becomes of weights that lossy steps replace: "keep" leaves them where they are, beside the new
            ones; "cpu" moves them to main memory; "drop" gives each up as soon as it is replaced, so that memory
            never holds more than the original model and one layer, and `restore` is no longer possible.
        progress: called after each measurement and each product that is quantized. None: a bar on standard error, if
            that is a terminal, from two seconds on.

    Raises:
        UnsupportedModelError: the model cannot be optimised, or not by these configs; every obstacle is listed. Or a
            step failed with an error of another kind, which is the cause. Goals leave out what fails.
        ConflictError: the model is optimised already, or two configs claim one place.
        ConfigError: the goal or a config does not exist or does not fit.
        VerificationError: the optimised model differs by more than rounding explains; it has been restored.
    """
    setting = _setting(model, draft_model, originals)
    with shown(f"optimising {type(setting.model).__name__}") if progress is None else nullcontext(progress) as step:
        setting.progress = step
        chosen = _plan(setting, goal_or_configs, calibration, tokenizer, max_kl)
        reference = None
        if verify_on is not None:
            with converting(ConfigError, "The model itself cannot continue the text given as verify_on"):
                reference = Reference(setting.model, verify_on)
        host = apply(chosen.plan, setting, chosen.patchers, leaves_out=isinstance(goal_or_configs, str))
        if chosen.quality is not None:
            host.report.quality = chosen.quality.compare()
        if reference is not None:
            _verify(reference, host)
    return model


def restore(model: M) -> M:
    """Take back everything `optimize` did; the model computes bit for bit what it computed before.

    Raises:
        ConflictError: the model is not optimised.
        IrreversibleError: it was optimised with originals="drop"; nothing was undone.
    """
    _host(model).journal.undo()
    return model


@contextmanager
def optimized(model: M, goal_or_configs: Goal = "exact", **options: Any) -> Iterator[M]:
    """Optimise for the length of a `with` block; the model is restored at its end, also after an exception.

    Raises: as `optimize`; ConfigError for originals="drop", after which nothing could be undone.
    """
    if options.get("originals") == "drop":
        raise ConfigError('optimized restores the model at the end of the block, which originals="drop" rules out.')
    optimize(model, goal_or_configs, **options)
    try:
        yield model
    finally:
        if host_of(unwrap(model)) is not None:
            restore(model)


def report(model: Any) -> Report:
    """Return the report of an optimised model: changes, skips with reasons, bytes, speed, calls served since.

    Raises:
        ConflictError: the model is not optimised.
    """
    return _host(model).report


def _host(model: Any) -> Host:
    unwrapped = unwrap(model)
    host = host_of(unwrapped) if isinstance(unwrapped, torch.nn.Module) else None
    if host is None:
        raise ConflictError(
            f"This {type(unwrapped).__name__} is not optimised (a copy of an optimised model is a stock model). "
            "Call hf_accel.optimize(model) first."
        )
    return host


def _setting(model: Any, draft_model: Any, originals: str = "keep") -> Setting:
    unwrapped = unwrap(model)
    if isinstance(unwrapped, torch.nn.Module) and host_of(unwrapped) is not None:
        raise ConflictError(
            f"This {type(unwrapped).__name__} is optimised already. Call hf_accel.restore(model) first; "
            "hf_accel.report(model) tells what was done."
        )
    return Setting.of(model, draft_model=draft_model, originals=originals)


class _Chosen(NamedTuple):
    """A plan; its patchers, where they were checked on this model; by what its cost is measured once it is applied."""

    plan: Plan
    patchers: Patchers | None = None
    quality: QualityReference | None = None


def _plan(setting: Setting, goal_or_configs: Goal, calibration: Any, tokenizer: Any, max_kl: float | None) -> _Chosen:
    if isinstance(goal_or_configs, str):
        options = {"calibration": calibration, "tokenizer": tokenizer, "max_kl": max_kl}
        return _Chosen(plan_goal(setting, goal_or_configs, **options))
    if max_kl is not None:
        raise ConfigError('max_kl bounds the goals "fast" and "memory"; configs are applied as they are given.')
    if isinstance(goal_or_configs, Plan):
        chosen = goal_or_configs
        if setting.draft_model is not None:
            chosen = replace(chosen, draft_model=setting.draft_model)
        setting.draft_model = chosen.draft_model
        return _Chosen(chosen, quality=_quality(setting, chosen, calibration, tokenizer))
    configs = [goal_or_configs] if isinstance(goal_or_configs, Config) else goal_or_configs
    if not isinstance(configs, Sequence):
        raise ConfigError(f"optimize takes a goal, configs or a plan; {goal_or_configs!r} was given.")
    chosen = Plan.of(list(configs), setting.draft_model)
    quality = _quality(setting, chosen, calibration, tokenizer)
    patchers = checked(chosen, setting)
    if all(patcher.stage is not Stage.ARCHITECTURE for patcher in patchers):  # the others see another model then
        for patcher in patchers:
            chosen.weight_bytes = patcher.weight_bytes(setting) or chosen.weight_bytes
    return _Chosen(chosen, patchers, quality)


def _quality(setting: Setting, plan: Plan, calibration: Any, tokenizer: Any) -> QualityReference | None:
    """Return what a plan is measured by, where text is given, apart from what steps of it are fitted to."""
    if calibration is None:
        return None
    with converting(UnsupportedModelError, "The model's distributions on the calibration text cannot be had"):
        is_fitted = any(Patcher.for_config(step.config).is_fitted_to_text for step in plan.steps)
        row_tokens = FITTED_ROW_TOKENS if is_fitted else ROW_TOKENS
        text = calibration_text(setting.model, calibration, tokenizer, row_tokens=row_tokens)
        setting.calibration, measured = text.split() if is_fitted else (text, text)
        return QualityReference(setting.model, measured)


def _verify(reference: Reference, host: Host) -> None:
    bound = of_text_logits(reference.model.dtype)
    if any(step.fidelity == Fidelity.LOSSY.value for step in host.report.applied):
        bound = math.inf
    try:
        with converting(VerificationError, "The optimised model could not be verified, and has been restored"):
            difference = reference.difference()
    except BaseException:
        host.journal.undo()
        raise
    host.calls = host.report.calls = CallLog()  # the calls that verified are none of the user's
    if not difference <= bound:
        host.journal.undo()
        raise VerificationError(
            f"On the verification text the logits differ by {difference:.1e} of their norm; rounding explains "
            f"{bound:.0e}. The model has been restored."
        )
    promised = "lossy steps promise no bound" if bound == math.inf else f"bound {bound:.0e}"
    host.report.verified = f"logits differ by {difference:.1e} of their norm ({promised})"
