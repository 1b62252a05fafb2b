"""Configs say *what* to do, as plain data: frozen, compared by value, written to and read from JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from hf_accel.errors import ConfigError, described


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every config. A subclass is a frozen keyword-only dataclass whose fields are JSON values."""

    types: ClassVar[dict[str, type[Config]]] = {}
    quant_method: ClassVar[str] = "hf_accel"  # the quantizer that transformers takes a config to when it loads a model

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Config.types[cls.__name__] = cls

    def check_integer(self, name: str, lowest: int, highest: int | None = None) -> None:
        """Check that the field `name` is a whole number (no bool) in [lowest, highest].

        Raises:
            ConfigError: it is not.
        """
        value = getattr(self, name)
        if type(value) is not int or value < lowest or (highest is not None and value > highest):
            bounds = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
            raise ConfigError(f"{type(self).__name__}.{name} is a whole number, {bounds}; {value!r} was given.")

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values; `type` names the class."""
        return {"type": type(self).__name__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the config that `to_dict` described.

        Raises:
            ConfigError: the type or one of the fields does not exist.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"A config is described by a dictionary; {data!r} was given.")
        values = dict(data)
        name = values.pop("type", cls.__name__)
        found = Config.types.get(name) if isinstance(name, str) else None
        if found is None or not issubclass(found, cls):
            known = ", ".join(sorted(k for k, v in Config.types.items() if issubclass(v, cls)))
            raise ConfigError(f"There is no config called {name!r}. Known: {known}.")
        fields = {field.name for field in dataclasses.fields(found)}
        if unknown := sorted(set(values) - fields):
            raise ConfigError(f"{name} has no field {unknown}. It has: {', '.join(sorted(fields)) or 'none'}.")
        try:
            return found(**values)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{values!r} are no values of a {name} ({described(error)}).") from error
