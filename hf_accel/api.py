"""The verbs: optimize, restore, optimized, plan, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from hf_accel.core.calls.hosting import Host, host_of
from hf_accel.core.calls.report import Report
from hf_accel.core.config import Config
from hf_accel.core.model.support import unwrap
from hf_accel.core.progress import shown
from hf_accel.core.steps.applying import Patchers, apply, checked
from hf_accel.core.steps.patcher import Stage
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, ConflictError
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.measure.reference import Reference
from hf_accel.planner import Asked, Named, addition, goal_called, optimize_beside, plan_beside, plan_goal
from hf_accel.planner.comparing import logits_on, measured_on, quality_of, text_for, verify

M = TypeVar("M")
Goal = str | Config | Sequence[str | Config] | Plan


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
            `max_kl`; "memory": the fewest bytes within `max_kl`), one or several configs, or both in a list, as
            `["exact", WeightOnlyConfig(bits=4)]`: the configs are applied as they are, and the goal fills the places
            they leave, tried and timed on the model with them.
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
    asked, setting = Asked.of(goal_or_configs), _setting(model, draft_model)
    with shown(f"planning for {type(setting.model).__name__}") as setting.progress:
        chosen = _plan(setting, asked, calibration, tokenizer, max_kl)
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
        goal_or_configs: a goal ("exact", "fast" or "memory"), one or several configs, a goal beside configs in a list,
            or an edited `Plan`.
        calibration, tokenizer, max_kl: how lossy steps are measured and bounded, see `plan`.
        draft_model: a smaller model with the same tokenizer, which `SpeculativeConfig` may draft with. It is not
            changed, and is kept until `restore`.
        verify_on: token ids [B, T], or a tokenizer's output, on which the logits before and after are compared.
            With lossy steps the difference is reported and has no bound; what a goal adds beside configs that change
            logits has the bound of rounding, against the model with these configs alone.
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
    asked, setting = Asked.of(goal_or_configs), _setting(model, draft_model, originals)
    with shown(f"optimising {type(setting.model).__name__}") if progress is None else nullcontext(progress) as step:
        setting.progress = step
        options = {"calibration": calibration, "tokenizer": tokenizer, "max_kl": max_kl}
        if asked.goal is not None and asked.configs:
            host, quality, references = _optimize_beside(setting, asked.goal, asked.configs, options, verify_on)
        else:
            chosen = _plan(setting, asked, **options)
            quality, references = chosen.quality, (logits_on(setting, verify_on), None)
            host = apply(chosen.plan, setting, chosen.patchers, leaves_out=asked.goal is not None)
        if quality is not None:
            host.report.quality = quality.compare()
        verify(*references, host)
        if asked.goal is None and host.report.goal == Plan.goal:
            configs = [step.config for step in chosen.plan.steps]
            glance = Setting.of(setting.model, draft_model=setting.draft_model)
            glance.is_glance = True
            host.report.addition = addition(glance, configs)
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


def _plan(setting: Setting, asked: Asked, calibration: Any, tokenizer: Any, max_kl: float | None) -> _Chosen:
    options = {"calibration": calibration, "tokenizer": tokenizer, "max_kl": max_kl}
    if asked.goal is not None and not asked.configs:
        return _Chosen(plan_goal(setting, asked.goal, **options))
    if asked.goal is not None:
        setting.keep_prepared()  # weights are checked, and made, once
        named, text = _named(setting, asked.goal, asked.configs, options)
        options["calibration"] = text
        return _Chosen(plan_beside(setting, asked.goal, named, **options), list(named.patchers))
    if max_kl is not None:
        raise ConfigError('max_kl bounds the goals "fast" and "memory"; configs are applied as they are given.')
    if asked.plan is not None:
        chosen = asked.plan
        if setting.draft_model is not None:
            chosen = replace(chosen, draft_model=setting.draft_model)
        setting.draft_model = chosen.draft_model
        return _Chosen(
            chosen, quality=quality_of(setting, [step.config for step in chosen.steps], calibration, tokenizer)
        )
    chosen = Plan.of(list(asked.configs), setting.draft_model)
    quality = quality_of(setting, asked.configs, calibration, tokenizer)
    patchers = checked(chosen, setting)
    if all(patcher.stage is not Stage.ARCHITECTURE for patcher in patchers):  # the others see another model then
        for patcher in patchers:
            chosen.weight_bytes = patcher.weight_bytes(setting) or chosen.weight_bytes
    return _Chosen(chosen, patchers, quality)


def _optimize_beside(
    setting: Setting, goal: str, configs: Sequence[Config], options: dict[str, Any], verify_on: Any
) -> tuple[Host, QualityReference | None, tuple[Reference | None, Reference | None]]:
    """Apply configs and what a goal adds; return what quality and logits are compared with, too."""
    named, text = _named(setting, goal, configs, options)
    quality = None if text is None else measured_on(setting, text, configs)
    reference = logits_on(setting, verify_on)
    host, alone = optimize_beside(setting, goal, named, verify_on=verify_on, **(options | {"calibration": text}))
    return host, quality, (reference, alone)


def _named(
    setting: Setting, goal: str, configs: Sequence[Config], options: dict[str, Any]
) -> tuple[Named, CalibrationText | None]:
    """Check a goal and the configs beside it; return them with the text, of which the setting has what is fitted to."""
    goal_called(goal, options["calibration"], options["max_kl"], Named(tuple(configs)))
    text = text_for(setting, configs, options["calibration"], options["tokenizer"])
    return Named.of(configs, setting), text
