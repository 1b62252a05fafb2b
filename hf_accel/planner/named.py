"""Configs that are named beside a goal: they are applied as they are, and the goal fills the places they leave.

What they make of the architecture and the weights is in place before the goal's steps are tried, so that these are
compared with, and timed on, the model with it. Steps of later stages stand in every plan that is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_accel.core.calls.report import Addition
from hf_accel.core.config import Config
from hf_accel.core.steps.applying import Patchers, checked
from hf_accel.core.steps.goal import Gain
from hf_accel.core.steps.patcher import Fidelity, Patcher, Stage
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """What the user wants: a goal, configs, a goal beside configs, or a plan."""

    goal: str | None = None
    configs: tuple[Config, ...] = ()
    plan: Plan | None = None

    @classmethod
    def of(cls, value: Any) -> Asked:
        """Understand what a verb was given.

        Raises:
            ConfigError: it is none of these, has two goals, or nothing in it.
        """
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Plan):
            return cls(plan=value)
        entries = [value] if isinstance(value, Config) else value
        if not isinstance(entries, Sequence):
            raise ConfigError(f"optimize takes a goal, configs or a plan; {value!r} was given.")
        goals = [entry for entry in entries if isinstance(entry, str)]
        if len(goals) > 1:
            raise ConfigError(f"One goal may stand beside configs; {', '.join(map(repr, goals))} were given. Keep one.")
        if not entries:
            raise ConfigError('The list names nothing: give a goal such as "exact", configs, or a goal beside configs.')
        for entry in entries:
            if not isinstance(entry, (str, Config)):
                raise ConfigError(
                    f"A plan is made of configs, with a goal beside them if wanted; {entry!r} is a "
                    f"{type(entry).__name__}."
                )
        configs = tuple(entry for entry in entries if isinstance(entry, Config))
        if not configs:
            raise ConfigError(f"The list has a goal and no configs beside it: pass {goals[0]!r} by itself.")
        return cls(goals[0] if goals else None, configs)


@dataclass(frozen=True)
class Named:
    """The configs that stand beside a goal, and their patchers in the order of their stages, with what they need.

    is_trial: nothing stays of what is applied, so that no tensors of the model are moved for it.
    """

    configs: tuple[Config, ...] = ()
    patchers: Sequence[Patcher[Any]] = ()
    is_trial: bool = False

    @classmethod
    def of(cls, configs: Sequence[Config], setting: Setting) -> Named:
        """Check the configs. Raises: as `checked`."""
        return cls(tuple(configs), checked(Plan.of(list(configs), setting.draft_model), setting))

    @property
    def first(self) -> Patchers:
        """What makes the architecture and the weights, or moves them: in place before the goal's steps are tried."""
        return [
            patcher
            for patcher in self.patchers
            if patcher.stage <= Stage.WEIGHTS or (patcher.moves_tensors and not self.is_trial)
        ]

    @property
    def then(self) -> Patchers:
        """What is applied among the goal's steps."""
        first = self.first
        return [patcher for patcher in self.patchers if patcher not in first]

    @property
    def claims(self) -> dict[str, str]:
        """The places that are taken, and by which config."""
        return {patcher.occupies: type(patcher.config).__name__ for patcher in self.patchers}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(type(config).__name__ for config in self.configs)

    @property
    def is_exact(self) -> bool:
        """Whether the model computes the same with all of them."""
        return all(patcher.fidelity is Fidelity.EXACT for patcher in self.patchers)

    def steps(self, patchers: Sequence[Patcher[Any]]) -> list[Step]:
        """Return the steps of those of `patchers` that the user named."""
        return [Step(patcher.config, is_named=True) for patcher in patchers if patcher.config in self.configs]

    def tried(self, setting: Setting) -> list[Step]:
        """Return the steps of later stages, needed ones too, that stand in the plans tried on the model as it is now.

        What watches over its own gain is left out, as it is of the goal's steps.
        """
        left_out = [
            patcher
            for patcher in self.patchers
            if patcher.stage <= Stage.WEIGHTS
            or patcher.gain is Gain.OWN_ACCOUNT
            or (patcher.moves_tensors and self.is_trial)
            or patcher.obstacles(setting)
        ]
        return [Step(patcher.config, is_named=True) for patcher in self.patchers if patcher not in left_out]

    def addition(self, goal: str, offered: Sequence[Config]) -> Addition | None:
        """Return what the goal would add by trying the configs it offers beside these; None: nothing."""
        written = ", ".join([f'"{goal}"', *(config.written() for config in self.configs)])
        return Addition(goal, tuple(type(config).__name__ for config in offered), f"[{written}]") if offered else None
