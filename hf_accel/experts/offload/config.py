"""How much of the experts stays in memory, and where the others lie."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExpertOffloadConfig(Config):
    """The routed experts lie in a file, and those that are used most in memory: for models that do not fit.

    budget_bytes: of memory for weights of experts. None: `share` of all of them.
    share: of the bytes of all experts, above 0, to 1; of no effect beside budget_bytes.
    folder: where the file lies, which has no name and leaves nothing behind; None: the system's temporary folder.
    """

    budget_bytes: int | None = None
    share: float = 0.5
    folder: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.budget_bytes is not None:
            self.check_integer("budget_bytes", 1)
        if type(self.share) not in (int, float) or not 0 < self.share <= 1:
            raise ConfigError(f"{name}.share is a number above 0, to 1; {self.share!r} was given.")
        if not isinstance(self.folder, str | None):
            raise ConfigError(f"{name}.folder is a path as a string; {self.folder!r} was given.")
