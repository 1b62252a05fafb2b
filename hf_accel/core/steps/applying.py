"""Applies plans: every step is checked once, before anything is changed; applying is all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_accel.core.calls.hosting import Host, host_of, open_host
from hf_accel.core.calls.report import Applied, Report, Skip
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.journal import Journal
from hf_accel.core.steps.patcher import Change, Patcher, Stage
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConflictError, HfAccelError, UnsupportedModelError

Patchers = list[Patcher[Any]]


def checked(plan: Plan, setting: Setting) -> Patchers:
    """Return the patchers of a plan in the order of their stages, having changed nothing.

    Raises:
        ConflictError: two steps claim one place, or another thread has optimised the model meanwhile.
        UnsupportedModelError: steps cannot be applied to this model; all obstacles are listed.
    """
    patchers = arranged(plan)
    obstacles = [f"{_name(patcher)}: {text}" for patcher in patchers for text in _obstacles(patcher, setting)]
    if obstacles and host_of(setting.model) is not None:
        raise ConflictError(
            f"This {type(setting.model).__name__} has been optimised by another thread meanwhile, so that the plan "
            f"does not fit it any more ({obstacles[0]}). hf_accel.report(model) tells what was done."
        )
    if obstacles:
        listed = "\n  - ".join(obstacles)
        raise UnsupportedModelError(f"The plan cannot be applied to this model:\n  - {listed}")
    return patchers


def arranged(plan: Plan) -> Patchers:
    """Return the patchers of a plan and of what its steps need in the order of their stages, unchecked.

    Raises:
        ConflictError: two steps claim one place.
    """
    patchers = [Patcher.for_config(step.config) for step in plan.steps]
    for needed in [name for patcher in patchers for name in patcher.needs]:
        if all(_name(patcher) != needed for patcher in patchers):
            patchers.append(Patcher.for_config(Config.from_dict({"type": needed})))
    patchers.sort(key=lambda patcher: patcher.stage)
    claims: dict[str, str] = {}
    for patcher in patchers:
        name = _name(patcher)
        if patcher.occupies in claims:
            raise ConflictError(
                f"{claims[patcher.occupies]} and {name} both change the {patcher.occupies}. Keep one of them."
            )
        claims[patcher.occupies] = name
    return patchers


def apply(plan: Plan, setting: Setting, patchers: Patchers | None = None, *, leaves_out: bool = False) -> Host:
    """Apply every step of a plan and return the host of the model; on any error nothing stays.

    patchers: what `checked` returned for this plan and setting; None: they are checked now.
    leaves_out: a step that fails is left out, with the reason in the report; else its error is raised.

    Raises:
        UnsupportedModelError: a step failed with an error that is not of this tree, which is the cause.
        Others: as `checked`; ConflictError: another thread has optimised the model meanwhile.
    """
    return _apply(plan, setting, patchers, leaves_out, Journal(setting.originals))


def apply_further(plan: Plan, setting: Setting, host: Host, patchers: Patchers) -> None:
    """Apply the steps of `patchers` to a model that has its host, for a goal: what fails and is not fixed is left out.

    What the plan says of itself is the report's from now on. Raises: as `apply`; what was applied by then stays.
    """
    report = host.report
    report.goal, report.speed, report.quality = plan.goal, plan.measured, plan.quality
    report.named = tuple(type(step.config).__name__ for step in plan.named)
    report.skipped += plan.skipped
    _apply_all(patchers, plan, setting, host, leaves_out=True)


def _apply(plan: Plan, setting: Setting, patchers: Patchers | None, leaves_out: bool, journal: Journal) -> Host:
    patchers = checked(plan, setting) if patchers is None else patchers
    host = Host(journal, new_report(plan, setting), draft_model=setting.draft_model)
    with undone_on_errors(host):
        open_host(setting.model, host)
        _apply_all(patchers, plan, setting, host, leaves_out)
    return host


def _apply_all(patchers: Patchers, plan: Plan, setting: Setting, host: Host, leaves_out: bool) -> None:
    failed, fixed = set[str](), plan.fixed
    for patcher in patchers:
        _apply_one(patcher, plan, setting, host, failed, leaves_out and _name(patcher) not in fixed)


@contextmanager
def undone_on_errors(host: Host) -> Iterator[None]:
    """Undo everything that was done to the host's model if the block raises, as far as it can be undone."""
    try:
        yield
    except BaseException as error:
        if host.journal.given_up:
            error.add_note(
                f'{len(host.journal.given_up)} original modules had been given up by then (originals="drop"): '
                "the model is half changed and cannot be restored. Load it anew."
            )
            raise
        host.journal.undo()
        raise


@contextmanager
def applied(plan: Plan, setting: Setting) -> Iterator[Host]:
    """Apply a plan for the length of the block, giving nothing up. Raises: as `apply`."""
    host = _apply(plan, setting, None, False, Journal())
    try:
        yield host
    finally:
        host.journal.undo()
        if any(Patcher.for_config(step.config).stage is Stage.ARCHITECTURE for step in plan.steps):
            setting.describe_anew()


def new_report(plan: Plan, setting: Setting) -> Report:
    """Return the report of a plan on this model, before any step."""
    anatomy = setting.anatomy
    return Report(
        model=type(anatomy.model).__name__,
        goal=plan.goal,
        device=str(anatomy.device),
        dtype=str(anatomy.dtype).removeprefix("torch."),
        weight_bytes=anatomy.weight_bytes,
        skipped=list(plan.skipped),
        speed=plan.measured,
        quality=plan.quality,
        named=tuple(type(step.config).__name__ for step in plan.named),
    )


def _apply_one(
    patcher: Patcher[Any], plan: Plan, setting: Setting, host: Host, failed: set[str], leaves_out: bool
) -> None:
    """Apply one step and report it; the name of a step that is left out joins `failed`."""
    name, report, start = _name(patcher), host.report, len(host.journal)
    if missing := sorted(failed & set(patcher.needs)):
        failed.add(name)
        report.skipped.append(Skip(name, f"it needs {missing[0]}, which is left out"))
        return
    try:
        change = _patched(patcher, setting, host)
    except HfAccelError as error:
        if not leaves_out or host.journal.given_up:
            raise
        host.journal.undo(start)
        failed.add(name)
        report.skipped.append(Skip(name, str(error)))
        return
    if patcher.stage is Stage.ARCHITECTURE:
        setting.describe_anew()  # the stages that follow see what was made of it
    if change.weight_bytes is not None:
        report.patched_weight_bytes = change.weight_bytes
    gain = next((step.gain for step in plan.steps if step.config == patcher.config), None)
    report.applied.append(Applied(patcher.config, change.summary, change.extra_bytes, patcher.fidelity.value, gain))
    report.skipped += [Skip(name, reason) for reason in change.skipped]


def _name(patcher: Patcher[Any]) -> str:
    return type(patcher.config).__name__


def _obstacles(patcher: Patcher[Any], setting: Setting) -> list[str]:
    kind = type(setting.model).__name__
    with converting(UnsupportedModelError, f"Whether {_name(patcher)} fits this {kind} could not be found out"):
        return patcher.obstacles(setting)


def _patched(patcher: Patcher[Any], setting: Setting, host: Host) -> Change:
    kind = type(setting.model).__name__
    advice = "Leave it out, or use a goal, which leaves out what fails."
    with converting(UnsupportedModelError, f"{_name(patcher)} could not be set up on this {kind}", advice):
        return patcher.patch(setting, host)
