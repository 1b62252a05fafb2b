"""Turns a goal into a plan: asks every patcher for candidates, checks each by applying it once, and times them.

All of it happens on a copy that shares the model's tensors: the model's hooks do not run, and it may be in use.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_accel.core.calls.report import Skip
from hf_accel.core.config import Config
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.goal import Gain, Goal
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, HfAccelError, described
from hf_accel.measure.quality import QualityReference
from hf_accel.measure.text import calibration_text
from hf_accel.planner.timing import keep_what_pays
from hf_accel.planner.trying import name_of

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
    calibration: Any = None,
    tokenizer: Any = None,
    max_kl: float | None = None,
) -> Plan:
    """Return the plan for the goal called `name`, having timed its candidates on the model, which is left as it was.

    Args:
        calibration, tokenizer: the text that lossy goals measure on, see `calibration_text`.
        max_kl: nats per token that lossy goals may cost; None: the goal's own bound.

    Raises:
        ConfigError: the goal or an argument does not exist or does not fit.
    """
    goal = _goal(name, calibration, max_kl)
    plan = Plan(goal=name, draft_model=setting.draft_model)
    setting.keep_prepared()
    trial = _trial(setting)
    with evaluating(trial.model):
        if goal.is_lossy:
            goal = replace(goal, reference=_reference(trial, calibration, tokenizer))
            setting.calibration = trial.calibration
        offer(plan, trial, _candidates(plan, trial, goal))
        on_own_account = [step for step in plan.steps if Patcher.for_config(step.config).gain is Gain.OWN_ACCOUNT]
        plan.steps = plan.without(*(type(step.config) for step in on_own_account)).steps
        _verify(plan, trial)
        if plan.steps:
            keep_what_pays(plan, goal, trial)
        for step in on_own_account:
            missing = set(Patcher.for_config(step.config).needs) - {name_of(other) for other in plan.steps}
            if missing:
                plan.skipped.append(Skip(name_of(step), f"it needs {min(missing)}, which is left out"))
            else:
                plan.steps.append(step)
        for step in plan.steps:
            plan.weight_bytes = Patcher.for_config(step.config).weight_bytes(trial) or plan.weight_bytes
    if plan.weight_bytes is None:
        plan.quality = None
    if goal.is_lossy:
        del trial, goal
        gc.collect()  # nothing may hold originals that are to be given up
    return plan


def _goal(name: str, calibration: Any, max_kl: float | None) -> Goal:
    if name not in GOALS:
        raise ConfigError(f"There is no goal called {name!r}. Goals: {', '.join(GOALS)}. Or pass a list of configs.")
    goal = GOALS[name]
    if not goal.is_lossy and not (calibration is None and max_kl is None):
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


def _trial(setting: Setting) -> Setting:
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


def _candidates(plan: Plan, setting: Setting, goal: Goal) -> list[Config]:
    """Return what all patchers offer for a goal, the preferred first where two claim one place."""
    configs: list[Config] = []
    for cls in Patcher.all():
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


def offer(plan: Plan, setting: Setting, configs: list[Config]) -> None:
    """Put every config without obstacles into the plan; of two that claim one place the first."""
    claims: dict[str, str] = {}
    for config in configs:
        patcher, name = Patcher.for_config(config), type(config).__name__
        obstacles = _obstacles(patcher, setting)
        if not obstacles and (reason := patcher.beside(claims)):
            obstacles = [reason]
        if not obstacles and patcher.occupies in claims:
            obstacles = [f"{claims[patcher.occupies]} is preferred for the {patcher.occupies}"]
        if obstacles:
            plan.skipped.append(Skip(name, "; ".join(obstacle.rstrip(".") for obstacle in obstacles)))
        else:
            claims[patcher.occupies] = name
            plan.steps.append(Step(config))


def _obstacles(patcher: Patcher[Any], setting: Setting) -> list[str]:
    try:
        return patcher.obstacles(setting)
    except Exception as error:  # of a model that is made otherwise than any that was thought of
        return [f"it could not be found out whether it fits ({described(error)})"]


def _verify(plan: Plan, setting: Setting) -> None:
    """Apply each candidate once; one that fails, by its own check or otherwise, is left out with the reason."""
    for step in list(plan.steps):
        try:
            with applied(Plan(steps=[step]), setting):
                pass
        except HfAccelError as error:
            plan.steps.remove(step)
            plan.skipped.append(Skip(name_of(step), str(error)))
        setting.advance()
