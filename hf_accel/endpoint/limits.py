"""What an endpoint refuses: how many requests, how large, how long."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hf_accel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of an endpoint.

    running: `generate` calls at a time, each in a thread of its own. waiting: requests that wait for one of these; one
    more is refused with status 429. context_tokens: of prompt and new tokens together; None: what the model's config
    says. new_tokens: that a request may ask for; None: what the context leaves. choices: that a request may ask for
    (`n`). body_bytes: of a request. drain_s: seconds that requests are given to finish when the server is stopped.

    Raises:
        ConfigError: a bound is not a number, or too small.
    """

    running: int = 1
    waiting: int = 64
    context_tokens: int | None = None
    new_tokens: int | None = None
    choices: int = 8
    body_bytes: int = 4 * 2**20
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, is_optional = getattr(self, field.name), "None" in str(field.type)
            if value is None and is_optional:
                continue
            kinds = (int, float) if field.name == "drain_s" else (int,)
            least = 0 if field.name in ("waiting", "drain_s") else 1
            if type(value) not in kinds or not value >= least:
                raise ConfigError(f"Limits({field.name}={value!r}) does not fit: give a number, {least} at least.")
