"""Turns a goal into a plan: asks every patcher for candidates, checks each by applying it once, and times them.

All of it happens on a copy that shares the model's tensors: the model's hooks do not run, and it may be in use.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.calls.report import Addition, Skip
from hf_accel.core.config import Config
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.applying import applied, arranged
from hf_accel.core.steps.goal import Gain, Goal
from hf_accel.core.steps.patcher import Fidelity, Patcher
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, HfAccelError, described
from hf_accel.measure.quality import QualityReference
from hf_accel.measure.text import calibration_text
from hf_accel.planner.named import Named
from hf_accel.planner.timing import keep_what_pays
from hf_accel.planner.trying import name_of

NOTHING = Named()
LEAST_FITTED_TOKENS = 1024  # of a text, below which all of it is measured on and nothing fitted to it
# see docs/quantization.md for what the bounds, in nats per token, mean on trained models
GOALS = {
    "exact": Goal("exact"),
    "fast": Goal("fast", max_kl=0.05),
    "memory": Goal("memory", max_kl=0.2, saves_memory=True),
}


def plan_goal(
    setting: Setting,
    name: str,
    *,
    named: Named = NOTHING,
    calibration: Any = None,
    tokenizer: Any = None,
    max_kl: float | None = None,
) -> Plan:
    """Return the plan for the goal called `name`, having timed its candidates on the model, which is left as it was.

    Args:
        named: the configs that stand beside the goal; the model has its `first` steps in place.
        calibration, tokenizer: the text that lossy goals measure on, see `calibration_text`.
        max_kl: nats per token that lossy goals may cost; None: the goal's own bound.

    Raises:
        ConfigError: the goal or an argument does not exist or does not fit.
    """
    goal = goal_called(name, calibration, max_kl, named)
    plan = Plan(goal=name, steps=named.steps(named.patchers), draft_model=setting.draft_model)
    setting.keep_prepared()
    trial = trial_of(setting)
    if host_of(trial.model) is not None:
        reason = f"nothing could be tried: a {type(trial.model).__name__} with {named.names[0]} cannot be copied"
        plan.skipped.append(Skip(f'goal "{name}"', reason))
        return plan
    plan.steps = named.tried(trial)
    in_place = {name_of(step) for step in (*named.steps(named.first), *plan.steps)}
    with evaluating(trial.model):
        if goal.is_lossy:
            goal = replace(goal, reference=_reference(trial, calibration, tokenizer))
            setting.calibration = trial.calibration
        offer(plan, trial, _candidates(plan, trial, goal, named), named)
        on_own_account = [step for step in plan.offered if Patcher.for_config(step.config).gain is Gain.OWN_ACCOUNT]
        plan.steps = plan.without(*(type(step.config) for step in on_own_account)).steps
        _verify(plan, trial)
        if plan.offered:
            keep_what_pays(plan, goal, trial, tuple(name for name in named.names if name in in_place))
        for step in on_own_account:
            there = {*map(name_of, plan.steps), *named.claims.values()}
            missing = set(Patcher.for_config(step.config).needs) - there
            if missing:
                plan.skipped.append(Skip(name_of(step), f"it needs {min(missing)}, which is left out"))
            else:
                plan.steps.append(step)
        for step in plan.steps:
            plan.weight_bytes = Patcher.for_config(step.config).weight_bytes(trial) or plan.weight_bytes
    if plan.weight_bytes is None:
        plan.quality = None
    if plan.quality is not None and named.first:
        what = ", ".join(type(patcher.config).__name__ for patcher in named.first)
        plan.quality = replace(plan.quality, against=f"the model with {what}")
    plan.steps = [*named.steps(named.patchers), *plan.offered]
    if goal.is_lossy:
        del trial, goal
        gc.collect()  # nothing may hold originals that are to be given up
    return plan


def goal_called(name: str, calibration: Any = None, max_kl: float | None = None, named: Named = NOTHING) -> Goal:
    """Return the goal called `name`, with the bound `max_kl`.

    Raises:
        ConfigError: it does not exist, or an argument does not fit it and the configs beside it.
    """
    if name not in GOALS:
        raise ConfigError(f"There is no goal called {name!r}. Goals: {', '.join(GOALS)}. Or pass a list of configs.")
    goal = GOALS[name]
    if not goal.is_lossy and not (max_kl is None and (calibration is None or named.configs)):
        raise ConfigError(f'calibration and max_kl belong to the goals "fast" and "memory"; the goal is "{name}".')
    if max_kl is None:
        return goal
    if not (isinstance(max_kl, (int, float)) and 0 < max_kl < math.inf):
        raise ConfigError(f"max_kl is a positive number of nats per token; {max_kl!r} was given.")
    return replace(goal, max_kl=max_kl)


def _reference(setting: Setting, calibration: Any, tokenizer: Any) -> Callable[[], QualityReference]:
    """Return what makes the reference of lossy steps once, or raises what keeps it from being made.

    Of a text that is long enough the setting keeps some four fifths, which steps are fitted to, and not measured on.

    Raises:
        ConfigError: the calibration text does not fit.
    """
    model = setting.model
    try:
        text = calibration_text(model, calibration, tokenizer)
        if calibration is not None and text.ids.numel() >= LEAST_FITTED_TOKENS:
            setting.calibration, text = text.split()
    except ConfigError:
        raise
    except Exception as error:  # memory may be short, or the model's own code may fail
        failure = error

        def fail() -> QualityReference:
            raise failure

        return fail
    return functools.cache(lambda: QualityReference(model, text))


def trial_of(setting: Setting) -> Setting:
    """Return a session over a copy to try steps on, with what is prepared shared; over the model if need be."""
    model = twin(setting.model)
    if model is setting.model:
        return setting
    trial = setting.over(model)
    if setting.draft_model is setting.model:
        trial.draft_model = model
    return trial


def untimed(setting: Setting, configs: list[Config]) -> Plan:
    """Return the plan of `configs` and of every exact step that fits beside them, untimed."""
    plan = Plan(draft_model=setting.draft_model)
    exact = _candidates(plan, setting, GOALS["exact"])
    timed = [config for config in exact if Patcher.for_config(config).gain is not Gain.OWN_ACCOUNT]
    offer(plan, setting, [*configs, *timed])
    return plan


def addition(setting: Setting, configs: Sequence[Config]) -> Addition | None:
    """Return what the goal "exact" would try beside configs that are in place; nothing is run or timed for it."""
    named = Named(tuple(configs), arranged(Plan.of(list(configs))))
    if any(patcher.is_trainable for patcher in named.patchers):
        return None
    plan = Plan()
    offer(plan, setting, _candidates(plan, setting, replace(GOALS["exact"], is_only_told=True), named), named)
    return named.addition("exact", [step.config for step in plan.steps])


def _candidates(plan: Plan, setting: Setting, goal: Goal, named: Named = NOTHING) -> list[Config]:
    """Return what all patchers offer for a goal, the preferred first where two claim one place.

    Those whose place a named config has are not asked.
    """
    configs: list[Config] = []
    for cls in Patcher.all():
        if (owner := named.claims.get(cls.occupies)) is not None:
            if owner != cls.config_class.__name__ and cls.fidelity is Fidelity.EXACT:
                plan.skipped.append(Skip(cls.config_class.__name__, f"{owner} has the {cls.occupies}"))
            continue
        try:
            found = cls.candidates(goal, setting)
        except ConfigError:
            raise
        except Exception as error:  # memory may be short, or the model's own code may fail
            reason = f"what it costs could not be measured ({described(error)})"
            plan.skipped.append(Skip(cls.config_class.__name__, reason))
            continue
        configs += found.configs
        plan.skipped += found.skipped
        plan.quality = found.quality or plan.quality
    return configs


def offer(plan: Plan, setting: Setting, configs: list[Config], named: Named = NOTHING) -> None:
    """Put every config without obstacles into the plan; of two that claim one place the first."""
    claims = named.claims
    for config in configs:
        patcher, name = Patcher.for_config(config), type(config).__name__
        reason = obstacles_of(config, setting) or patcher.beside(claims)
        if not reason and patcher.occupies in claims:
            reason = f"{claims[patcher.occupies]} is preferred for the {patcher.occupies}"
        if reason:
            plan.skipped.append(Skip(name, reason))
        else:
            claims[patcher.occupies] = name
            plan.steps.append(Step(config))


def obstacles_of(config: Config, setting: Setting) -> str:
    """Return why a config cannot be applied to the model, in one sentence, "" if it can."""
    try:
        found = Patcher.for_config(config).obstacles(setting)
    except Exception as error:  # of a model that is made otherwise than any that was thought of
        found = [f"it could not be found out whether it fits ({described(error)})"]
    return "; ".join(obstacle.rstrip(".") for obstacle in found)


def _verify(plan: Plan, setting: Setting) -> None:
    """Apply each candidate once; one that fails, by its own check or otherwise, is left out with the reason."""
    for step in plan.offered:
        try:
            with applied(Plan(steps=[*plan.named, step]), setting):
                pass
        except HfAccelError as error:
            plan.steps.remove(step)
            plan.skipped.append(Skip(name_of(step), str(error)))
        setting.advance()
