"""Our own keywords of `generate`, and how they are understood.

A keyword is understood before anything runs, so that an error in it reaches the caller; what is understood may stand at
doors for the length of the call, in place of what the model was optimised with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_accel.core.calls.call import Request
from hf_accel.core.calls.doors import Door
from hf_accel.errors import ConfigError


@dataclass(frozen=True)
class Keyword:
    """One keyword of `generate`.

    understand: (model, value, all other arguments) -> what stands at `doors` in this call; where there are none, what
        `Request.options` holds under the keyword's name.
    """

    name: str
    understand: Callable[[Any, Any, dict[str, Any]], Any]
    doors: tuple[Door, ...] = ()


KEYWORDS: dict[str, Keyword] = {}


def register(keyword: Keyword) -> None:
    """Let `generate` of optimised models take a keyword."""
    KEYWORDS[keyword.name] = keyword


def understood(model: Any, own: dict[str, Any], arguments: dict[str, Any]) -> Request:
    """Return what a call asks for by keywords of ours: `own`, their values; `arguments`, everything else it was given.

    Raises:
        HfAccelError: a value that does not exist, does not fit the model or excludes another argument.
    """
    request = Request()
    for name, value in own.items():
        keyword = KEYWORDS[name]
        found = keyword.understand(model, value, arguments)
        if keyword.doors:
            request.standing |= dict.fromkeys(keyword.doors, found)
        else:
            request.options[name] = found
    return request


def _tenant(model: Any, value: Any, arguments: dict[str, Any]) -> str:
    """Understand `generate(tenant=...)`: whose text may be drawn on, and whose it becomes."""
    if not isinstance(value, str):
        raise ConfigError(f"tenant is a name, a text; {value!r} was given.")
    return value


# of a call and of no family: whoever keeps something of one call for the next asks whose it is
register(Keyword("tenant", _tenant))
