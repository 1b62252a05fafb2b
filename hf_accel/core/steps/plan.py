"""A plan is the list of steps before anything happens: printable, editable, JSON. Applying is all or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hf_accel.core.calls.report import Skip
from hf_accel.core.config import Config
from hf_accel.core.steps.patcher import Patcher
from hf_accel.errors import ConfigError, ConflictError


@dataclass(frozen=True)
class Step:
    """One config to apply, and what applying it gained when it was measured (a ratio of times per token).

    is_named: the user named it beside a goal, which neither judges it nor leaves it out.
    """

    config: Config
    gain: float | None = None
    is_named: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "gain": self.gain, **({"is_named": True} if self.is_named else {})}


@dataclass
class Plan:
    """What will be applied, and what will not be and why. Edit `steps` freely before applying."""

    goal: str = "configs"
    steps: list[Step] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    measured: Any = None  # the Speed that the planner saw, if it measured
    quality: Any = None  # the Quality that the lossy steps were measured to have
    weight_bytes: int | None = None  # of all weights afterwards, where the steps change them
    previews: list[Any] = field(default_factory=list)  # what steps are expected to cost, told and not read
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

    @property
    def named(self) -> list[Step]:
        """The steps that the user named beside the goal."""
        return [step for step in self.steps if step.is_named]

    @property
    def fixed(self) -> set[str]:
        """Names of the configs that the goal may not leave out: the named ones, and what they need."""
        patchers = [Patcher.for_config(step.config) for step in self.named]
        return {name for patcher in patchers for name in (type(patcher.config).__name__, *patcher.needs)}

    @property
    def offered(self) -> list[Step]:
        """The steps that the goal chose, and may leave out."""
        fixed = self.fixed
        return [step for step in self.steps if type(step.config).__name__ not in fixed]

    def to_dict(self) -> dict[str, Any]:
        return {
            "goal": self.goal,
            "steps": [step.to_dict() for step in self.steps],
            "skipped": [{"what": skip.what, "reason": skip.reason} for skip in self.skipped],
            "weight_bytes": self.weight_bytes,
            **({"previews": [preview.to_dict() for preview in self.previews]} if self.previews else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Build the plan that `to_dict` described.

        Raises:
            ConfigError: it does not describe a plan, or a config does not exist or does not fit.
        """
        try:
            _check_values(data)
            steps = [
                Step(Config.from_dict(step["config"]), step.get("gain"), step.get("is_named", False))
                for step in data.get("steps", [])
            ]
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
            raise ConfigError(f"A plan is read from JSON, which what was given is not ({error}).") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        lines = [f"plan for goal {self.goal}{beside(self.named)}:"]
        lines += [
            f"  {step.config}"
            + (f"  ({step.gain:.2f} x)" if step.gain is not None else "")
            + ("  (named)" if step.is_named else "")
            for step in self.steps
        ]
        if self.weight_bytes is not None:
            lines.append(f"  weights afterwards {self.weight_bytes / 1e6:.1f} MB")
        if self.quality is not None:
            lines.append(f"  quality: {self.quality}")
        lines += [f"  {line}" for preview in self.previews for line in str(preview).splitlines()]
        lines += [f"  not {skip.what}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)


def beside(named: list[Step]) -> str:
    """Return what stands behind the name of a goal where steps were named beside it, "" where none was."""
    return f" beside {', '.join(type(step.config).__name__ for step in named)}" if named else ""


def _check_values(data: dict[str, Any]) -> None:
    """Check the values of a plan's description, but for its configs, which check themselves.

    Raises:
        TypeError: one is of another type; or AttributeError, where there is no dictionary.
    """
    told: Any = (dict, type(None))  # what `hf-accel plan --json` tells beside the plan, and is not read
    of_a_plan = {"goal": str, "steps": list, "skipped": list, "weight_bytes": (int, type(None))}
    expected: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (data, of_a_plan | {"measured": told, "quality": told, "previews": list})
    ]
    of_a_step = {"config": dict, "gain": (int, float, type(None)), "is_named": bool}
    expected += [(step, of_a_step) for step in data.get("steps", [])]
    expected += [(skip, {"what": str, "reason": str}) for skip in data.get("skipped", [])]
    for values, types in expected:
        for name, value in values.items():
            if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is not bool):
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, int):
                float(value)  # it is printed as one
