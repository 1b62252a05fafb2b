"""A patcher says *how* one config changes a model in place. Defining the class registers it."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.steps.goal import Gain, Goal, Offer
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError

C = TypeVar("C", bound=Config)


class Stage(enum.IntEnum):
    """The order in which steps are applied."""

    ARCHITECTURE = 0  # what the model is made of; it is described anew afterwards
    WEIGHTS = 1  # what the weights are
    PRODUCTS = 2  # how they are multiplied
    ATTENTION = 3
    CACHE = 4
    DECODING = 5
    SPECULATION = 6  # drafts with copies of what all the others have made of the model
    COMPILATION = 7


class Fidelity(enum.Enum):
    """What a step promises about the model's outputs; the contract tests check it.

    EXACT: the same function, tokens included, up to the rounding of one and the same mathematics.
    CLOSE: a bounded difference that the config states. LOSSY: quality is traded and must be measured.
    """

    EXACT = "exact"
    CLOSE = "close"
    LOSSY = "lossy"


@dataclass(frozen=True)
class Change:
    """What one step did: a sentence, the bytes it keeps beside the weights, and what it left out and why.

    weight_bytes: of all weights, where the step changed them.
    """

    summary: str
    extra_bytes: int = 0
    skipped: tuple[str, ...] = field(default=())
    weight_bytes: int | None = None


class Patcher(ABC, Generic[C]):
    """One optimisation. Subclass with `config=` to register: `class XPatcher(Patcher[XConfig], config=XConfig)`."""

    stage: ClassVar[Stage]
    fidelity: Fidelity
    occupies: ClassVar[str]  # the place in the model that only one step can have
    needs: tuple[str, ...] = ()  # names of configs that are applied, too, where the plan does not have them
    gain: ClassVar[Gain] = Gain.TOKENS
    saves_memory: ClassVar[bool] = False  # goals that save memory keep it whatever it does to time
    is_fitted_to_text: ClassVar[bool] = False  # what it costs is measured on text that is kept back from it
    is_preferred: ClassVar[bool] = False  # offered before the others of its stage
    moves_tensors: ClassVar[bool] = False  # those of the model, which copies share: never applied for a trial alone
    is_trainable: ClassVar[bool] = False  # the model's weights may be trained while it is applied
    config_class: ClassVar[type[Config]]
    registry: ClassVar[dict[type[Config], type[Patcher[Any]]]] = {}

    def __init_subclass__(cls, config: type[Config], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.config_class = config
        Patcher.registry[config] = cls

    def __init__(self, config: C) -> None:
        self.config = config

    @staticmethod
    def for_config(config: Config) -> Patcher[Any]:
        """Return the patcher of `config`.

        Raises:
            ConfigError: nothing is registered for its type.
        """
        found = Patcher.registry.get(type(config))
        if found is None:
            known = ", ".join(sorted(c.__name__ for c in Patcher.registry))
            raise ConfigError(f"No optimisation is registered for {type(config).__name__}. Known configs: {known}.")
        return found(config)

    @staticmethod
    def all() -> list[type[Patcher[Any]]]:
        """Return every registered patcher in the order in which their candidates are offered."""
        return sorted(Patcher.registry.values(), key=lambda cls: (cls.stage, not cls.is_preferred))

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        """Return the configs that serve `goal` on this model; obstacles are looked for later, and gains are timed.

        The config with its defaults, unless a step is lossy: what it may cost it has to find out itself.
        """
        return Offer([] if cls.fidelity is Fidelity.LOSSY else [cls.config_class()])

    def beside(self, claimed: Mapping[str, str]) -> str | None:
        """Return why the step gains nothing beside those that have the places `claimed`, None if it may."""
        return None

    @abstractmethod
    def obstacles(self, setting: Setting) -> list[str]:
        """Return why the step cannot be applied, in sentences for the user; empty if it can. Changes nothing."""

    def weight_bytes(self, setting: Setting) -> int | None:
        """Return the bytes of all weights once the step is applied and originals are given up; None: as before."""
        return None

    def parts(self, setting: Setting) -> int | None:
        """Return how often the step calls `setting.advance` when it is applied; None: that is not known before."""
        return None

    def preview(self, setting: Setting) -> Any:
        """Return what the step is expected to cost, tried without changing anything; None: nothing worth telling.

        What is returned has `to_dict`, and as text what a plan shows.
        """
        return None

    @abstractmethod
    def patch(self, setting: Setting, host: Host) -> Change:
        """Apply the step through the host's journal and say what was done."""
