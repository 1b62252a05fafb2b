"""A goal beside named configs: these are put in place first, and the goal is planned for the model with them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import Skip
from hf_accel.core.steps.applying import applied, apply, apply_further, arranged, undone_on_errors
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.reference import Reference
from hf_accel.planner.goals import obstacles_of, plan_goal, trial_of
from hf_accel.planner.named import Named
from hf_accel.planner.trying import drop


def plan_beside(setting: Setting, goal: str, named: Named, **options: Any) -> Plan:
    """Return the plan of the configs and of what the goal adds to them, timed; the model is left as it was.

    options: as of `plan_goal`. Raises: as `plan_goal`, and what the configs raise when they are applied.
    """
    trial, named = trial_of(setting), replace(named, is_trial=True)
    with applied(Plan(steps=named.steps(named.first)), trial) as host:
        trial.describe_anew()
        plan = plan_goal(trial, goal, named=named, **options)
        plan.weight_bytes = plan.weight_bytes or host.report.patched_weight_bytes
    for patcher in named.patchers:
        if patcher.moves_tensors:
            plan.skipped.append(Skip(f'goal "{goal}"', f"its steps were tried without {type(patcher.config).__name__}"))
    return plan


def optimize_beside(
    setting: Setting, goal: str, named: Named, *, verify_on: Any = None, **options: Any
) -> tuple[Host, Reference | None]:
    """Apply the configs and what the goal adds to them.

    Returns the host, and the logits on `verify_on` of the model with the configs alone, where they change logits.

    options: as of `plan_goal`. Raises: as `apply` and `plan_goal`; the model is as it was then.
    """
    host = apply(Plan(goal=goal, steps=named.steps(named.first)), setting, named.first)
    with undone_on_errors(host):
        setting.describe_anew()
        reference = None if verify_on is None or named.is_exact else _reference(setting, named, verify_on)
        plan = plan_goal(setting, goal, named=named, **options)
        for step in plan.offered:  # hooks of the user's, which trials do not have, may be in the way
            if reasons := obstacles_of(step.config, setting):
                drop(plan, [step], reasons)
        rest = Plan(steps=[*named.steps(named.then), *plan.offered])
        apply_further(plan, setting, host, arranged(rest))
    return host, reference


def _reference(setting: Setting, named: Named, text: Any) -> Reference:
    trial = trial_of(setting)
    steps = named.tried(trial)
    with applied(Plan(steps=steps), trial) if steps else nullcontext():
        found = Reference(trial.model, text)
    found.model = setting.model  # which is to be compared, and the copy is given up
    return found
