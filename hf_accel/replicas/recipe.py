"""How a model is made on a replica: a small description that can be pickled and gives the same model everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from hf_accel.api import Goal, optimize, plan, restore
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.failures import converting
from hf_accel.core.steps.plan import Plan
from hf_accel.errors import ConfigError
from hf_accel.loading import load
from hf_accel.quantization.config import WeightOnlyConfig


class Made(NamedTuple):
    """A model, and its tokenizer if there is one."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class ModelRecipe:
    """What every replica makes its model from.

    source: a folder or the name of a model on the hub, for `hf_accel.load`; or a function without arguments that
        returns a model and its tokenizer (None: it is given token ids alone). Ray carries functions over by value or by
        module.
    goal_or_configs: as of `optimize`. Replicas that each measure a goal may keep different steps: `planned` decides
        once, for all. None: nothing is done to what was loaded.
    load_options: of `hf_accel.load`. Weights that are rounded as they are read are kept packed (`cache=True`) unless it
        says otherwise, so that replicas on one machine map the same file and share its pages.
    tokenizer: a folder or a name; None: `source`.
    threads: torch's threads in a replica; None: the CPUs that Ray grants it. More than these are never taken.

    Raises:
        ConfigError: a field does not fit.
    """

    source: str | os.PathLike[str] | Callable[[], tuple[Any, Any]]
    goal_or_configs: Goal | None = "exact"
    load_options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | os.PathLike[str] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.source) and not isinstance(self.source, (str, os.PathLike)):
            raise ConfigError(f"source is {self.source!r}; give a folder, a name, or a function that returns a model.")
        if callable(self.source) and self.load_options:
            raise ConfigError("load_options are for a folder or a name; a function loads its model itself.")
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
            raise ConfigError(f"threads is {self.threads!r}; it is a number of threads, 1 or more, or None.")

    def make(self) -> Made:
        """Return the model, optimised, and its tokenizer.

        Raises:
            ConfigError: the function returned something else than a model and a tokenizer.
            Others: as `hf_accel.load` and `optimize`.
        """
        if not callable(self.source):
            goal = Plan.of([]) if self.goal_or_configs is None else self.goal_or_configs
            return Made(load(self.source, goal, **self._options()), self._tokenizer())
        made = self.source()
        if not isinstance(made, tuple) or len(made) != 2 or not hasattr(made[0], "generate"):
            raise ConfigError(f"source returned a {type(made).__name__}; it returns (model, tokenizer).")
        if self.goal_or_configs is not None and host_of(made[0]) is None:
            optimize(made[0], self.goal_or_configs, originals="drop")
        return Made(made[0], made[1] if self.tokenizer is None else self._tokenizer())

    def planned(self) -> ModelRecipe:
        """Return a recipe with the plan that the goal gives on this machine; every replica, later ones too, applies it.

        The model is made here once for that.

        Raises:
            ConfigError: weights are rounded as they are read.
            Others: as `make` and `hf_accel.plan`.
        """
        if self.goal_or_configs is None or isinstance(self.goal_or_configs, Plan):
            return self
        if not callable(self.source) and self._is_rounded():
            raise ConfigError(
                "Weights are rounded as they are read, and a plan beside them is measured by each replica."
            )
        model = replace(self, goal_or_configs=None).make().model
        if host_of(model) is not None:
            if callable(self.source):  # it has optimised the model as it wants it
                return self
            restore(model)
        return replace(self, goal_or_configs=replace(plan(model, self.goal_or_configs), draft_model=None))

    def _is_rounded(self) -> bool:
        goal = self.goal_or_configs
        given: Sequence[Any] = goal if isinstance(goal, Sequence) and not isinstance(goal, str) else [goal]
        if isinstance(goal, Plan):
            given = [step.config for step in goal.steps]
        return self.load_options.get("memory_budget_bytes") is not None or any(
            type(config) is WeightOnlyConfig for config in given
        )

    def _options(self) -> dict[str, Any]:
        return {**({"cache": True} if self._is_rounded() else {}), **self.load_options}

    def _tokenizer(self) -> Any:
        name = self.source if self.tokenizer is None else self.tokenizer
        with converting(ConfigError, f"The tokenizer of {name} cannot be loaded", "Name one: tokenizer=..."):
            return AutoTokenizer.from_pretrained(name)
