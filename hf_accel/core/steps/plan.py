"""A plan is the list of steps before anything happens: printable, editable, JSON. Applying is all or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hf_accel.core.calls.hosting import Host, open_host
from hf_accel.core.calls.report import Applied, Report, Skip
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.patcher import Change, Patcher
from hf_accel.errors import ConfigError, ConflictError, HfAccelError, UnsupportedModelError


@dataclass(frozen=True)
class Step:
    """One config to apply, and what applying it gained when it was measured (a ratio of times per token)."""

    config: Config
    gain: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "gain": self.gain}


@dataclass
class Plan:
    """What will be applied, and what will not be and why. Edit `steps` freely before applying."""

    goal: str = "configs"
    steps: list[Step] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    measured: Any = None  # the Speed that the planner saw, if it measured
    quality: Any = None  # the Quality that the lossy steps were measured to have
    weight_bytes: int | None = None  # of all weights afterwards, where the steps change them
    draft_model: Any = None  # what speculation may draft with; no part of the JSON

    @classmethod
    def of(cls, configs: list[Config], draft_model: Any = None) -> Plan:
        """Return the plan that applies `configs`, unmeasured.

        Raises:
            ConfigError: an entry is not a config, or one type is given twice.
        """
        for config in configs:
            if not isinstance(config, Config):
                raise ConfigError(f"A plan is made of configs; {config!r} is a {type(config).__name__}.")
        names = [type(config).__name__ for config in configs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConflictError(f"{', '.join(twice)} given more than once. Keep one of each.")
        return cls(steps=[Step(config) for config in configs], draft_model=draft_model)

    def without(self, *types: type[Config]) -> Plan:
        """Return a copy without the steps of these config types, and without those that need them."""
        names = {cls.__name__ for cls in types}

        def stays(config: Config) -> bool:
            needs = getattr(Patcher.registry.get(type(config)), "needs", ())
            return not isinstance(config, types) and names.isdisjoint(needs)

        return replace(self, steps=[step for step in self.steps if stays(step.config)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "goal": self.goal,
            "steps": [step.to_dict() for step in self.steps],
            "skipped": [{"what": skip.what, "reason": skip.reason} for skip in self.skipped],
            "weight_bytes": self.weight_bytes,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Build the plan that `to_dict` described.

        Raises:
            ConfigError: it does not describe a plan, or a config does not exist or does not fit.
        """
        try:
            _check_values(data)
            steps = [Step(Config.from_dict(step["config"]), step.get("gain")) for step in data.get("steps", [])]
            skipped = [Skip(**skip) for skip in data.get("skipped", [])]
            return cls(
                goal=data.get("goal", "configs"), steps=steps, skipped=skipped, weight_bytes=data.get("weight_bytes")
            )
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(
                f"This does not describe a plan ({error!r}). A plan is what `Plan.to_dict` or `Plan.to_json` returned."
            ) from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Build the plan that `to_json` wrote.

        Raises:
            ConfigError: the text is no JSON, or does not describe a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"A plan is read from JSON; what was given is none ({error}).") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        lines = [f"plan for goal {self.goal}:"]
        lines += [
            f"  {step.config}" + (f"  ({step.gain:.2f} x)" if step.gain is not None else "") for step in self.steps
        ]
        if self.weight_bytes is not None:
            lines.append(f"  weights afterwards {self.weight_bytes / 1e6:.1f} MB")
        if self.quality is not None:
            lines.append(f"  quality: {self.quality}")
        lines += [f"  not {skip.what}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)

    def check(self, anatomy: Anatomy) -> list[Patcher[Any]]:
        """Return the patchers in the order of their stages, having changed nothing.

        Raises:
            ConflictError: two steps claim one place.
            UnsupportedModelError: steps cannot be applied to this model; all obstacles are listed.
        """
        anatomy.draft_model = self.draft_model
        patchers = [Patcher.for_config(step.config) for step in self.steps]
        for needed in [name for patcher in patchers for name in patcher.needs]:
            if all(type(patcher.config).__name__ != needed for patcher in patchers):
                patchers.append(Patcher.for_config(Config.from_dict({"type": needed})))
        patchers.sort(key=lambda patcher: patcher.stage)
        claims: dict[str, str] = {}
        for patcher in patchers:
            name = type(patcher.config).__name__
            if patcher.occupies in claims:
                raise ConflictError(
                    f"{claims[patcher.occupies]} and {name} both change the {patcher.occupies}. Keep one of them."
                )
            claims[patcher.occupies] = name
        obstacles = [f"{type(p.config).__name__}: {text}" for p in patchers for text in _obstacles(p, anatomy)]
        if obstacles:
            listed = "\n  - ".join(obstacles)
            raise UnsupportedModelError(f"The plan cannot be applied to this model:\n  - {listed}")
        return patchers

    def apply(self, anatomy: Anatomy, host: Host, *, leaves_out: bool = False) -> None:
        """Apply every step through the host's journal and fill the host's report; on any error nothing stays.

        leaves_out: a step that fails is left out, with the reason in the report; else its error is raised.

        Raises:
            UnsupportedModelError: a step failed with an error that is not of this tree, which is the cause.
        """
        patchers = self.check(anatomy)
        gains = {step.config: step.gain for step in self.steps}
        before, failed = len(host.journal), set[str]()
        try:
            host.draft_model = self.draft_model
            open_host(anatomy.model, host)
            for patcher in patchers:
                name = type(patcher.config).__name__
                if missing := sorted(failed & set(patcher.needs)):
                    failed.add(name)
                    host.report.skipped.append(Skip(name, f"it needs {missing[0]}, which is left out"))
                    continue
                start = len(host.journal)
                try:
                    change = _patched(patcher, anatomy, host)
                except HfAccelError as error:
                    if not leaves_out or host.journal.given_up:
                        raise
                    host.journal.undo(start)
                    failed.add(name)
                    host.report.skipped.append(Skip(name, str(error)))
                    continue
                if change.weight_bytes is not None:
                    host.report.patched_weight_bytes = change.weight_bytes
                gain = gains.get(patcher.config)
                fidelity = patcher.fidelity.value
                host.report.applied.append(Applied(patcher.config, change.summary, change.extra_bytes, fidelity, gain))
                host.report.skipped += [Skip(name, reason) for reason in change.left_out]
        except BaseException as error:
            if host.journal.given_up:
                error.add_note(
                    f'{len(host.journal.given_up)} original modules had been given up by then (originals="drop"): '
                    "the model is half changed and cannot be restored. Load it anew."
                )
                raise
            host.journal.undo(before)
            host.report.applied.clear()
            raise


def _check_values(data: dict[str, Any]) -> None:
    """Check the values of a plan's description, but for its configs, which check themselves.

    Raises:
        TypeError: one is of another type; or AttributeError, where there is no dictionary.
    """
    told: Any = (dict, type(None))  # what `hf-accel plan --json` tells beside the plan, and is not read
    of_a_plan = {"goal": str, "steps": list, "skipped": list, "weight_bytes": (int, type(None))}
    expected: list[tuple[dict[str, Any], dict[str, Any]]] = [(data, of_a_plan | {"measured": told, "quality": told})]
    expected += [(step, {"config": dict, "gain": (int, float, type(None))}) for step in data.get("steps", [])]
    expected += [(skip, {"what": str, "reason": str}) for skip in data.get("skipped", [])]
    for values, types in expected:
        for name, value in values.items():
            if not isinstance(value, types[name]) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, int):
                float(value)  # it is printed as one


def _obstacles(patcher: Patcher[Any], anatomy: Anatomy) -> list[str]:
    name, kind = type(patcher.config).__name__, type(anatomy.model).__name__
    with converting(UnsupportedModelError, f"Whether {name} fits this {kind} could not be found out"):
        return patcher.obstacles(anatomy)


def _patched(patcher: Patcher[Any], anatomy: Anatomy, host: Host) -> Change:
    name, kind = type(patcher.config).__name__, type(anatomy.model).__name__
    advice = "Leave it out, or use a goal, which leaves out what fails."
    with converting(UnsupportedModelError, f"{name} could not be set up on this {kind}", advice):
        return patcher.patch(anatomy, host.journal)


def new_report(anatomy: Anatomy, plan: Plan) -> Report:
    """Return the report of `plan` on this model, before any step."""
    return Report(
        model=type(anatomy.model).__name__,
        goal=plan.goal,
        device=str(anatomy.device),
        dtype=str(anatomy.dtype).removeprefix("torch."),
        weight_bytes=anatomy.weight_bytes,
        skipped=list(plan.skipped),
        speed=plan.measured,
        quality=plan.quality,
    )
