"""Tries the steps of a plan before they are timed: what fails, or changes logits by more than rounding, is left out.

Two short rows, the first left-padded, are continued by stock and with the steps. Cost: some five forward passes.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from hf_accel.core.calls.report import Skip
from hf_accel.core.model.anatomy import is_packed
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.patcher import Fidelity, Patcher
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import described
from hf_accel.measure import random_prompt
from hf_accel.measure.reference import Reference
from hf_accel.ops.tolerances import of_text_logits

TOKENS, NEW_TOKENS = 4, 2


def drop_what_fails(plan: Plan, setting: Setting) -> float:
    """Write a text by stock and with all steps; take steps out of the plan that fail or give other logits.

    Stock is the model as it is with the named steps. Returns about how many seconds a token of it takes.
    """
    try:
        with applied(Plan(steps=plan.named), setting) if plan.named else nullcontext():
            start = time.perf_counter()
            reference = _reference(setting.model)
            token_s = (time.perf_counter() - start) / NEW_TOKENS
    except Exception as error:  # whatever the model's own code raises
        reason = f"nothing could be tried: the model itself cannot continue a random prompt ({described(error)})"
        drop(plan, plan.offered, reason)
        return 0.0
    fault = _fault(plan, setting, reference)
    if fault is None:
        return token_s
    faults = [(step, _fault(Plan(steps=[*plan.named, step]), setting, reference)) for step in plan.offered]
    for step, own in faults:
        if own is not None:
            drop(plan, [step], own)
    if not any(own for _, own in faults) or _fault(plan, setting, reference):
        drop(plan, plan.offered, fault)
    return token_s


def drop(plan: Plan, steps: list[Step], reason: str) -> None:
    """Take steps, and those that need them, out of the plan, with the reason."""
    kept = plan.without(*(type(step.config) for step in steps)).steps
    for step in [step for step in plan.steps if step not in kept]:
        plan.skipped.append(Skip(name_of(step), reason))
    plan.steps = kept


def name_of(step: Step) -> str:
    """Return the name of a step's config class."""
    return type(step.config).__name__


def _reference(model: PreTrainedModel) -> Reference:
    ids = random_prompt(model, TOKENS, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    return Reference(model, {"input_ids": ids, "attention_mask": mask}, NEW_TOKENS)


def _fidelity(step: Step) -> Fidelity:
    return Patcher.for_config(step.config).fidelity


def _fault(plan: Plan, setting: Setting, reference: Reference) -> str | None:
    """Return what is wrong with the text of a plan, None if its logits are stock's up to rounding."""
    is_rounded = is_packed(setting.model) or any(_fidelity(step) is not Fidelity.EXACT for step in plan.named)
    bound = of_text_logits(setting.anatomy.dtype, is_rounded)
    if any(_fidelity(step) is not Fidelity.EXACT for step in plan.offered):
        bound = math.inf
    try:
        with applied(plan, setting):
            difference = reference.difference()
    except Exception as error:  # whatever it is: a goal leaves out what fails
        return f"text could not be written with it ({described(error)})"
    finally:
        setting.advance()
    if difference <= bound or bound == math.inf:
        return None
    return f"logits differ from stock's by {difference:.1e} of their norm; rounding explains {bound:.0e}"
